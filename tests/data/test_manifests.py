"""Data sets in their own layouts: rows that are read, rows that are left out, and the reasons."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_cases import ends_with

from geo_r1.data.pairing import manifests
from geo_r1.data.pairing.manifests import read_sites
from geo_r1.data.pairing.tables import lines_of

HEADER = "id,lat,lon,city,ground,satellite"
PANORAMA = "rTW64elYRVtD5DWJ9kBgnA,40.731011,-73.995289,.jpg"
TILES = [
    "satellite_40.7309416656_-73.9953203614.png",
    "satellite_40.7312697381_-73.9953203614.png",
    "satellite_40.7309416656_-73.99488735.png",
    "satellite_40.7312697381_-73.99488735.png",
]


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def plain(path, **options):
    return read_sites("manifest", None, path, **options)


# A plain table


def test_a_plain_table_becomes_columns(tmp_path):
    rows = ["a,1.5,-2.5,Oslo,g/a.jpg,s/a.png", 'b,-90,180,"São, Paulo",g/b.jpg,./s//b.png', ""]
    sites, drops = plain(write(tmp_path / "m.csv", HEADER, *rows))
    assert (sites.root, len(sites), drops.report()) == (tmp_path, 2, {})
    assert (sites.id, sites.city) == (["a", "b"], ["Oslo", "São, Paulo"])
    assert (sites.ground, sites.satellite) == (["g/a.jpg", "g/b.jpg"], ["s/a.png", "s/b.png"])
    assert sites.latitude.tolist() == sites.tile_latitude.tolist() == [1.5, -90]
    assert sites.longitude.tolist() == sites.tile_longitude.tolist() == [-2.5, 180]
    assert sites.semi_positives == [(), ()]


def test_parquet_reads_as_csv_does(tmp_path):
    rows = [
        {"id": 7, "lat": 1.0, "lon": 2.0, "city": "x", "ground": "g", "satellite": "s", "extra": 1},
        {"id": 8, "lat": 3.0, "lon": None, "city": "x", "ground": "g", "satellite": "s", "extra": 1},
        {"id": 9, "lat": 3.0, "lon": 4.0, "city": "x", "ground": "h", "satellite": "t", "extra": 1},
    ]
    rows = [{**row, "semi_positives": ["s"] if row["id"] == 9 else None} for row in rows]
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    sites, drops = plain(path)
    assert (sites.id, sites.longitude.tolist(), sites.semi_positives) == (
        ["7", "9"],
        [2.0, 4.0],
        [(), ("s",)],
    )
    assert drops.counts == {"coordinates that are no latitude and longitude in degrees": 1}


def test_semi_positives_are_ids_or_paths(tmp_path):
    rows = ["a,1,1,x,g,s/a,b c", "b,1,1,x,g,s/b,", "bad,1,1000,x,g,s/e,a", "c,1,1,x,g,s/c,./s/a; with space;"]
    sites, _ = plain(write(tmp_path / "m.csv", f"{HEADER},semi_positives", *rows))
    assert sites.semi_positives == [("s/b", "s/c"), (), ("s/a", "with space")]


def test_every_bad_row_is_counted_by_its_reason(tmp_path):
    bad = [
        "a,1,1,x,g,s",
        ",1,1,x,g,s",
        "c,nan,1,x,g,s",
        "d,inf,1,x,g,s",
        "e,90.1,1,x,g,s",
        "f,1,-180.5,x,g,s",
        "g,one,1,x,g,s",
        "h,1,1,,g,s",
        "i,1,1,x,,s",
        "j,1,1,x,g,../s",
        "k,1,1,x,/g,s",
        "l,1,1,x,g/../../g,s",
        "m,1,1,x",
        "n,1,1,x,g,s,more",
        "p,1,1,x,.,s",
        "q,1,1,x,g,a\0b",
    ]
    path = write(tmp_path / "m.csv", HEADER, "a,1,1,x,g,s/../t", *bad)
    path.write_bytes(path.read_bytes() + b"o,1,1,x,g,\xff\n")
    sites, drops = plain(path)
    assert (sites.id, sites.satellite) == (["a"], ["t"])
    assert drops.counts == {
        "the id was there before": 1,
        "the id is empty": 1,
        "coordinates that are no latitude and longitude in degrees": 5,
        "the city is empty": 1,
        "an image path is empty": 1,
        "an image path leads outside the root": 5,
        "a wrong number of columns": 2,
        "text that is not UTF-8": 1,
    }
    assert drops.report()["the id was there before"] == {"count": 1, "first": [f"{path}, row 3 ('a')"]}
    assert drops.report()["a wrong number of columns"]["first"][0] == f"{path}, row 15"


def test_only_the_first_bad_rows_are_named(tmp_path):
    path = write(tmp_path / "m.csv", HEADER, *(f"{i},x,1,x,g,s" for i in range(9)), "a,1,1,x,g,s")
    [fault] = plain(path)[1].report().values()
    assert fault["count"] == 9 and len(fault["first"]) == 5


def test_without_a_city_column_square_degrees_are_cities(tmp_path):
    rows = ["a,37.9,-122.5,g,s", "b,-0.5,0.5,g,s", "c,90,180,g,s"]
    sites, _ = plain(write(tmp_path / "m.csv", "id,lat,lon,ground,satellite", *rows))
    assert sites.city == ["37N122W", "0S0E", "90N180E"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "", "the header must have id, lat, lon, ground, satellite, each once; it has nothing"),
        ("m.csv", "a,b\n", "the header must have id, lat, lon, ground, satellite, each once; it has a, b"),
        ("m.csv", f"{HEADER},lat\n", "each once; it has id, lat, lon, city, ground, satellite, lat"),
        ("m.csv", f"{HEADER}\n", "has no usable row: it is empty"),
        ("m.csv", f"{HEADER}\nb,,1,x,g,s\n", "1 x coordinates that are no latitude and longitude in degrees"),
        ("m.csv", f'{HEADER}\n"{"x" * 200_000}', "row 2: field larger than field limit (131072)"),
        ("m.txt", "", "m.txt: expected .csv or .parquet"),
        ("m.parquet", "", "Parquet"),
        ("m.parquet", "not parquet at all", "Parquet"),
    ],
)
def test_a_useless_file_is_one_line_that_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        plain(tmp_path / name)
    text = str(caught.value)
    assert message in text and str(tmp_path / name) in text
    assert "\n" not in text


def test_missing_files_and_arguments(tmp_path):
    for name in ("m.csv", "m.parquet"):
        with pytest.raises(ValueError, match=f"{name}.*No such file"):
            plain(tmp_path / name)
    ends_with("--source manifest needs --manifest, a .csv or .parquet file", lambda: plain(None))
    message = "--source vigor needs --root, the folder of the data set"
    ends_with(message, lambda: read_sites("vigor", None))
    ends_with(f"--root {tmp_path}/no is not a folder", lambda: read_sites("vigor", tmp_path / "no"))


def test_a_line_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("geo_r1.data.pairing.tables.MAX_LINE", 2**20)
    path = tmp_path / "m.csv"
    path.write_text("x" * (2**20 + 1))
    ends_with(f"{path}, row 1: longer than 1 MiB", lambda: list(lines_of(path)))


# CV-Cities


def cv_cities(root, *cities):
    for city in cities:
        rows = (
            f"{i},{i}.5,{-i}.25,{city},{city}/sat_images/{i}.jpg,{city}/pano_images/{i}.png" for i in (1, 2)
        )
        write(root / city / "img_info.csv", *rows)
    return root


def test_cv_cities_has_longitude_first(tmp_path):
    sites, drops = read_sites("cv-cities", cv_cities(tmp_path, "taipei", "rio"))
    assert (sites.id, sites.city) == (
        ["rio-1", "rio-2", "taipei-1", "taipei-2"],
        ["rio"] * 2 + ["taipei"] * 2,
    )
    assert (sites.longitude[0], sites.latitude[0], drops.counts) == (1.5, -1.25, {})
    assert (sites.satellite[2], sites.ground[2]) == ("taipei/sat_images/1.jpg", "taipei/pano_images/1.png")


def test_one_city_of_cv_cities(tmp_path):
    sites, _ = read_sites("cv-cities", cv_cities(tmp_path, "taipei") / "taipei")
    assert (sites.city, sites.satellite[0]) == (["taipei"] * 2, "sat_images/1.jpg")


def test_a_city_unpacked_into_a_folder_of_its_name(tmp_path):
    cv_cities(tmp_path / "rio", "rio")
    assert read_sites("cv-cities", tmp_path)[0].satellite[0] == "rio/rio/sat_images/1.jpg"


def test_paths_of_cv_cities_that_start_in_the_root_or_in_the_city(tmp_path):
    write(tmp_path / "rio" / "img_info.csv", "n,1,2,Rio,s/1.jpg,p/1.jpg", "n,1,2,Rio,/s/1.jpg,p/1.jpg", "n,1")
    sites, drops = read_sites("cv-cities", tmp_path)
    assert (sites.satellite, sites.ground) == (["rio/s/1.jpg"], ["rio/p/1.jpg"])
    assert drops.counts == {"an image path leads outside the root": 1, "a wrong number of columns": 1}
    write(tmp_path / "s" / "1.jpg")
    assert read_sites("cv-cities", tmp_path)[0].satellite == ["s/1.jpg"]


def test_no_index_of_cv_cities(tmp_path):
    message = f"--root {tmp_path} has no img_info.csv, nor has a folder in it"
    ends_with(message, lambda: read_sites("cv-cities", tmp_path))


# VIGOR


def vigor_line(panorama=PANORAMA):
    deltas = ("-68.0 -23.0", "253.0 -26.0", "-65.0 300.0", "257.0 297.0")
    return " ".join([panorama, *(f"{t} {d}" for t, d in zip(TILES, deltas, strict=True))])


def test_vigor_has_coordinates_in_names_and_three_semi_positives(tmp_path):
    lines = (vigor_line(), "too few words", vigor_line("a,b,c,.jpg"))
    write(tmp_path / "splits" / "NewYork" / f"{manifests.VIGOR_SPLIT}.txt", *lines)
    sites, drops = read_sites("vigor", tmp_path)
    assert (sites.id, sites.city) == (["NewYork-rTW64elYRVtD5DWJ9kBgnA"], ["NewYork"])
    assert (sites.latitude[0], sites.longitude[0]) == (40.731011, -73.995289)
    assert (sites.tile_latitude[0], sites.tile_longitude[0]) == (40.7309416656, -73.9953203614)
    assert sites.ground == [f"NewYork/panorama/{PANORAMA}"]
    assert sites.satellite == [f"NewYork/satellite/{TILES[0]}"]
    assert sites.semi_positives == [tuple(f"NewYork/satellite/{tile}" for tile in TILES[1:])]
    assert sum(drops.counts.values()) == 2


def test_vigor_sorted_by_kind_and_another_list(tmp_path):
    (tmp_path / "satellite").mkdir()
    write(tmp_path / "splits__corrected" / "Seattle" / "x__corrected.txt", vigor_line())
    sites, _ = read_sites("vigor", tmp_path, vigor_split="x__corrected")
    assert sites.ground == [f"ground/Seattle/{PANORAMA}"]
    assert sites.satellite == [f"satellite/Seattle/{TILES[0]}"]
    message = f"{tmp_path}/splits/<city>/y.txt does not exist for any city"
    ends_with(message, lambda: read_sites("vigor", tmp_path, vigor_split="y"))
    with pytest.raises(ValueError, match="must be the name of a list"):
        read_sites("vigor", tmp_path, vigor_split="../x")


# CVUSA


def test_cvusa_finds_coordinates_by_the_number_of_the_image(tmp_path):
    row = "bingmap/19/{0}.jpg,streetview/panos/{0}.jpg,streetview/annotations/{0}.png"
    write(tmp_path / "splits" / "train-19zl.csv", row.format("0000002"), row.format("0000009"), "a,b")
    write(tmp_path / "splits" / "val-19zl.csv", row.format("0000001"), row.format("x"))
    write(tmp_path / "split_locations" / "all.csv", "37.5,-122.5,1,1,0", "40.25,-80.75,2,2,0")
    sites, drops = read_sites("cvusa", tmp_path)
    assert (sites.id, sites.city) == (["0000002", "0000001"], ["40N80W", "37N122W"])
    np.testing.assert_array_equal(sites.latitude, [40.25, 37.5])
    assert (sites.satellite[0], sites.ground[0]) == ("bingmap/19/0000002.jpg", "streetview/panos/0000002.jpg")
    assert sum(drops.counts.values()) == 3
    only, _ = read_sites("cvusa", tmp_path, tmp_path / "splits" / "val-19zl.csv")
    assert only.id == ["0000001"]


def test_cvusa_without_lists_or_coordinates(tmp_path):
    message = f"{tmp_path}/splits/train-19zl.csv does not exist"
    ends_with(message, lambda: read_sites("cvusa", tmp_path))
    write(tmp_path / "splits" / "train-19zl.csv", "a,b,c")
    message = f"{tmp_path}/split_locations/all.csv, with the coordinates, does not exist"
    ends_with(message, lambda: read_sites("cvusa", tmp_path))
