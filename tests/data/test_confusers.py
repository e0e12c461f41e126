"""Wrong tiles: within their bounds, never the right one, and the same at every run."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from geo_r1.data.pairing import confusers
from geo_r1.data.pairing.confusers import KINDS, Chooser, Places
from geo_r1.data.pairing.manifests import Sites
from geo_r1.places import distance_km


def sites_at(latitude, longitude, *, city=None, satellite=None, semi=None, tile=None, ids=None):
    count = len(latitude)
    latitude, longitude = np.array(latitude, float), np.array(longitude, float)
    tile_latitude, tile_longitude = (latitude, longitude) if tile is None else map(np.array, tile)
    return Sites(
        Path("/data"),
        [str(i) for i in range(count)] if ids is None else ids,
        city or ["x"] * count,
        [f"g{i}" for i in range(count)],
        satellite or [f"s{i}" for i in range(count)],
        semi or [()] * count,
        latitude,
        longitude,
        tile_latitude,
        tile_longitude,
    )


def town(count, seed=0, spread=0.02, **options):
    """Sites around a point; 0.02 degrees are about 2 km."""
    rng = np.random.default_rng(seed)
    return sites_at(48 + rng.normal(0, spread, count), 2 + rng.normal(0, spread, count), **options)


def chosen(sites, kind="same_city", k=5, least=50.0, most=None, seed=0):
    num_wrong = np.full(len(sites), k - 1) if isinstance(k, int) else np.array(k) - 1
    chooser = Chooser(sites, num_wrong, min_distance=least, max_distance=most, seed=seed)
    chooser.choose(kind, np.arange(len(sites)))
    return chooser


def metres(sites, i, row):
    place = sites.latitude[i], sites.longitude[i]
    return 1000 * distance_km(*place, sites.tile_latitude[row], sites.tile_longitude[row])


def fitting(sites, i, least, most=np.inf):
    """Rows with a tile that may stand beside that of site i, nearest first; all coordinates differ."""
    rows = [
        (metres(sites, i, row), row)
        for row in range(len(sites))
        if row != i and sites.satellite[row] not in sites.semi_positives[i]
    ]
    return [(distance, row) for distance, row in sorted(rows) if least <= distance <= most]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("k", "most"), [(3, None), (10, None), (5, 900.0)])
def test_every_site_has_wrong_tiles_within_the_bounds(kind, k, most):
    sites = town(150)
    chooser = chosen(sites, kind, k, 300.0, most)
    some = 0
    for i in range(len(sites)):
        allowed = {row: distance for distance, row in fitting(sites, i, 300.0, most or np.inf)}
        rows = chooser.row[i].tolist()
        if len(allowed) < k - 1:
            assert set(rows) == {-1} and np.isnan(chooser.distance[i]).all()
            continue
        assert len(set(rows)) == k - 1 and set(rows) <= allowed.keys()
        np.testing.assert_allclose(chooser.distance[i], [allowed[row] for row in rows], atol=1e-3)
        some += 1
    assert some > 100


@pytest.mark.parametrize(("least", "most"), [(0.0, None), (50.0, None), (1500.0, None), (200.0, 1000.0)])
@pytest.mark.parametrize("widths", [confusers.WIDTHS, (1, 2), ()])
def test_nearest_are_the_nearest_that_fit(monkeypatch, least, most, widths):
    monkeypatch.setattr(confusers, "WIDTHS", widths or (1000,))
    sites = town(120, seed=1)
    chooser = chosen(sites, "nearest", 4, least, most)
    for i in range(len(sites)):
        allowed = fitting(sites, i, least, most or np.inf)
        expected = {row for _, row in allowed[:3]} if len(allowed) >= 3 else {-1}
        assert set(chooser.row[i].tolist()) == expected


def test_nearest_does_not_stand_in_order_of_distance():
    chooser = chosen(town(100), "nearest")
    steps = np.diff(chooser.distance, axis=1)
    assert 0.4 < (steps > 0).mean() < 0.6


@pytest.mark.parametrize(("few", "draws"), [(0, confusers.DRAWS), (8, confusers.DRAWS), (8, (1,))])
def test_every_tile_that_fits_is_as_likely(monkeypatch, few, draws):
    monkeypatch.setattr(confusers, "FEW", few)  # draws from all, from a list, or goes through the list
    monkeypatch.setattr(confusers, "DRAWS", draws)
    sites = town(30, spread=0.1)
    counts = Counter()
    for seed in range(300):
        counts.update(chosen(sites, k=4, least=1.0, seed=seed).row[0].tolist())
    assert counts.keys() == set(range(1, 30))
    expected = 300 * 3 / 29  # a chi-square of 28 degrees of freedom is above 57 once in 1000
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 57


@pytest.mark.parametrize("kind", KINDS)
def test_a_semi_positive_is_never_a_confuser(kind):
    semi = [("unknown", *(f"s{(i + step) % 40}" for step in range(1, 30))) for i in range(40)]
    sites = town(40, semi=semi)
    chooser = chosen(sites, kind, least=0.0)
    for i, rows in enumerate(chooser.row.tolist()):
        assert rows[0] >= 0 and not {sites.satellite[row] for row in rows} & {f"s{i}", *semi[i]}


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_that_sites_share_count_once(kind):
    latitude = np.arange(60) // 3 * 0.01
    sites = sites_at(latitude, np.zeros(60), satellite=[f"s{i // 3}" for i in range(60)])
    chooser = chosen(sites, kind, 10, least=0.0)
    for i, rows in enumerate(chooser.row.tolist()):
        assert len({sites.satellite[row] for row in rows} - {f"s{i // 3}"}) == 9


def test_other_tiles_of_the_same_spot_are_the_same_place():
    sites = sites_at([0, 0, 0, 1, 1, 2, 3], [0] * 7, semi=[("s3",), *[()] * 6])
    rows = chosen(sites, k=3, least=0.0).row
    assert set(rows[0].tolist()) == {5, 6}  # s4 is where the semi-positive s3 is
    assert not {0, 1, 2} & set(rows[:3].ravel().tolist())
    assert {len(set(sites.latitude[row].tolist())) for row in rows} == {2}


def test_a_tile_is_as_near_as_the_nearest_of_its_sites():
    latitude = [0, 0.001, 0.01, 0.02, 0.03]  # 111 m are 0.001 degrees
    sites = sites_at(latitude, [0] * 5, satellite=["a", "b", "b", "c", "d"])
    assert Places(sites).reach[Places(sites).of_site[1]] == pytest.approx(1000.8, abs=0.1)
    assert set(chosen(sites, "nearest", 3, least=500.0).row[0].tolist()) == {3, 4}
    assert chosen(sites, "nearest", 4, least=500.0).row[0].tolist() == [-1] * 3


def test_distances_are_measured_to_the_middle_of_the_tile():
    sites = sites_at([0, 0, 0], [0, 1, 2], tile=([0.0, 0.0, 0.0], [0.0, 1.5, 2.5]))
    chooser = chosen(sites, "nearest", 3)
    assert sorted(chooser.distance[0].tolist()) == pytest.approx([166792.4, 277987.3], abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 10])
def test_a_city_of_exactly_k_sites(kind, k):
    chooser = chosen(town(k), kind, k, least=1.0)
    for i, rows in enumerate(chooser.row.tolist()):
        assert sorted([i, *rows]) == list(range(k))
    assert (chosen(town(k - 1), kind, k, least=1.0).row == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_sites_at_one_spot_have_no_confusers(kind):
    for least in (0.0, 50.0):
        assert (chosen(sites_at([10] * 20, [20] * 20), kind, 3, least).row == -1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_across_the_date_line(kind):
    sites = sites_at([0.0] * 6, [179.999, -179.999, 180, -180, 179.99, -179.99])
    chooser = chosen(sites, kind, 3, 50.0, 300.0)
    assert set(chooser.row[0].tolist()) == {1, 2}  # -180 is where 180 is
    np.testing.assert_allclose(np.sort(chooser.distance[0]), [111.2, 222.4], atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_poles(kind):
    sites = sites_at([90, 90, 89.999, 89.999, 89.998], [0, 77, -90, 90, 45])
    chooser = chosen(sites, kind, 3, 50.0, 200.0)
    assert set(chooser.row[0].tolist()) == set(chooser.row[1].tolist()) == {2, 3}
    np.testing.assert_allclose(chooser.distance[1], 111.2, atol=0.1)
    south = sites_at([-90, -90, -89.99], [0, 10, 0])
    assert (chosen(south, kind, 3, 0.0).row == -1).all()


def test_antipodes_are_within_a_bound_of_half_the_globe():
    sites = sites_at([0, 0, 10], [0, 180, 30])
    for kind in KINDS:
        assert set(chosen(sites, kind, 3, 50.0, 20_100_000.0).row[0].tolist()) == {1, 2}
        assert set(chosen(sites, kind, 3, 50.0, 20_015_087.0).row[0].tolist()) == {1, 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [None, 800.0])
def test_the_same_for_any_size_of_chunk(monkeypatch, kind, most):
    sites = town(200)
    whole = chosen(sites, kind, least=200.0, most=most)
    monkeypatch.setattr(confusers, "ENTRIES", 100)
    pieces = chosen(sites, kind, least=200.0, most=most)
    np.testing.assert_array_equal(whole.row, pieces.row)
    assert (whole.row[:, 0] >= 0).sum() > 100
    if most is None and kind != "nearest":
        assert (chosen(sites, kind, least=200.0, seed=1).row != whole.row).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_each_site_gets_as_many_as_it_wants(kind):
    k = [3 + i % 8 for i in range(50)]
    rows = chosen(town(50), kind, k, least=1.0).row
    assert rows.shape == (50, 9)
    assert ((rows >= 0).sum(axis=1) == np.array(k) - 1).all()
    for row, wanted in zip(rows, k, strict=True):
        assert (row[: wanted - 1] >= 0).all()


def test_places_of_several_groups_stay_apart():
    sites = town(40)
    chooser = Chooser(sites, np.full(40, 4), min_distance=0.0, max_distance=None, seed=0)
    done = []
    chooser.choose("same_city", np.arange(0, 40, 2), done.append)
    chooser.choose("nearest", np.arange(1, 40, 2), done.append)
    assert sum(done) == 40
    assert (chooser.row[::2] % 2 == 0).all() and (chooser.row[1::2] % 2 == 1).all()
