"""Read sources of pairs (CV-Cities, VIGOR, CVUSA or a plain table) into columns of sites.

A site is an image from the ground and the satellite tile of the same place. Rows without a usable site are
left out and counted by reason; a file without any site is an error.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from geo_r1.data.columns import whole
from geo_r1.data.messages import is_absent
from geo_r1.data.pairing.tables import Drops, csv_rows, lines_of, table_rows
from geo_r1.errors import UserError
from geo_r1.places import is_coordinate

SOURCES = ("cv-cities", "vigor", "cvusa", "manifest")
COLUMNS = ("id", "lat", "lon", "ground", "satellite")  # of a plain table; it may also have a city
SEMI_POSITIVES = "semi_positives"
VIGOR_SPLIT = "same_area_balanced_train"
CVUSA_SPLITS = ("splits/train-19zl.csv", "splits/val-19zl.csv")
CVUSA_PLACES = ("split_locations/all.csv", "all.csv", "split/all.csv")

Semi = tuple[str, ...]


@dataclass
class Sites:
    """A table of sites; all columns have the same length.

    Attributes:
        root: the folder with all images.
        id, city: names; ids are unique, and a city has one spelling, its first (see `folded`).
        ground, satellite: normalised paths of the images below `root`, with /.
        semi_positives: for each site, the paths of other tiles that show it off their centre.
        latitude, longitude: the site's, in degrees.
        tile_latitude, tile_longitude: those of the tile's centre; the site's if unknown.
    """

    root: Path
    id: list[str]
    city: list[str]
    ground: list[str]
    satellite: list[str]
    semi_positives: list[Semi]
    latitude: np.ndarray
    longitude: np.ndarray
    tile_latitude: np.ndarray
    tile_longitude: np.ndarray

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: np.ndarray) -> Sites:
        """The sites at these positions."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "root"}
        picked: dict[str, Any] = {
            name: column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows.tolist()]
            for name, column in columns.items()
        }
        return Sites(self.root, **picked)


def read_sites(
    source: str, root: Path | None, manifest: Path | None = None, vigor_split: str = VIGOR_SPLIT
) -> tuple[Sites, Drops]:
    """Read a data set's sites without opening an image.

    Args:
        source: one of `SOURCES`.
        root: the data set's folder; for a plain table, the folder of its paths (default: its own).
        manifest: the plain table, .csv or .parquet; or the one CVUSA split to read.
        vigor_split: the VIGOR list to read for each city.

    Raises:
        UserError: a file is missing, malformed, or without a usable row; names it.
    """
    if source == "manifest":
        if manifest is None:
            raise UserError("--source manifest needs --manifest, a .csv or .parquet file")
        root = root or manifest.parent
    if root is None:
        raise UserError(f"--source {source} needs --root, the folder of the data set")
    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder")
    reader = _Reader(root)
    if source == "manifest" and manifest is not None:
        reader.table(manifest)
    elif source == "cv-cities":
        reader.cv_cities()
    elif source == "vigor":
        reader.vigor(vigor_split)
    else:
        reader.cvusa(manifest)
    return reader.sites()


class _Row(NamedTuple):
    """A site; the fields are the columns of `Sites`, in the same order."""

    id: str
    city: str
    ground: str
    satellite: str
    semi_positives: Semi
    latitude: float
    longitude: float
    tile_latitude: float
    tile_longitude: float


class _Reader:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.drops = Drops()
        self.rows: list[_Row] = []
        self.ids: set[str] = set()
        self.cities: dict[str, str] = {}  # folded name -> its first spelling

    def sites(self) -> tuple[Sites, Drops]:
        id, city, ground, satellite, semi, *numbers = map(list, zip(*self.rows, strict=True))
        degrees = (np.array(column, dtype=np.float64) for column in numbers)
        return Sites(self.root, id, city, ground, satellite, semi, *degrees), self.drops

    def add(
        self,
        where: str,
        *,
        id: str,
        place: Sequence[Any],
        city: str | None,
        ground: str,
        satellite: str,
        semi: Semi = (),
        tile: Sequence[Any] | None = None,
    ) -> None:
        """Keep a row, or drop it with a reason.

        Args:
            where: file and row.
            place, tile: latitude and longitude as text; the tile's default is `place`.
            city: None names the square degree instead.
        """
        points = [_degrees(point) for point in (place, place if tile is None else tile)]
        paths = [_inside(path) for path in (ground, satellite)]
        if not id:
            fault = "the id is empty"
        elif "\ufffd" in f"{id}{city}{ground}{satellite}":
            fault = "text that is not UTF-8"
        elif None in points:
            fault = "coordinates that are no latitude and longitude in degrees"
        elif city == "":
            fault = "the city is empty"
        elif not (ground and satellite):
            fault = "an image path is empty"
        elif None in paths:
            fault = "an image path leads outside the root"
        elif id in self.ids:
            fault = "the id was there before"
        else:
            (latitude, longitude), (tile_latitude, tile_longitude) = points  # type: ignore[misc]
            if city is None:
                city = _square(latitude, longitude)
            city = self.cities.setdefault(folded(city), city)
            self.ids.add(id)
            degrees = latitude, longitude, tile_latitude, tile_longitude
            self.rows.append(_Row(id, city, str(paths[0]), str(paths[1]), semi, *degrees))
            return
        self.drops.add(fault, f"{where} ({id!r:.80})")

    def used(self, path: Path, before: int) -> None:
        """Raise UserError if a file has no usable row."""
        if len(self.rows) == before:
            raise UserError(f"{path} has no usable row: {str(self.drops) or 'it is empty'}")

    def sized(
        self, path: Path, rows: Iterable[tuple[int, list[str]]], size: int
    ) -> Iterator[tuple[int, str, list[str]]]:
        """Yields number, location for errors, and columns of the rows of this size; drops the others."""
        for number, row in rows:
            where = f"{path}, row {number}"
            if len(row) == size:
                yield number, where, row
            else:
                self.drops.add("a wrong number of columns", where)

    def table(self, path: Path) -> None:
        """Read a plain table; its semi-positives are satellite paths or ids of rows."""
        before, named = len(self.rows), {}
        for number, row in table_rows(path, COLUMNS, ("city", SEMI_POSITIVES)):
            where = f"{path}, row {number}"
            if row is None:
                self.drops.add("a wrong number of columns", where)
                continue
            semi = row.pop(SEMI_POSITIVES, None)
            named[len(self.rows)] = _names(semi) if semi else ()
            id, lat, lon, ground, satellite = (_text(row[c]) for c in COLUMNS)
            city = _text(row["city"]) if "city" in row else None
            self.add(where, id=id, place=(lat, lon), city=city, ground=ground, satellite=satellite)
        self.used(path, before)
        tiles = {row.id: row.satellite for row in self.rows}
        for i, names in named.items():
            if names and i < len(self.rows):
                semi = tuple(tiles.get(name) or _inside(name) or name for name in names)
                self.rows[i] = self.rows[i]._replace(semi_positives=semi)

    def cv_cities(self) -> None:
        """Read city folders with img_info.csv: name, longitude, latitude, city, satellite, panorama."""
        folder = self.root.resolve()
        indexes = [folder / "img_info.csv"] if (folder / "img_info.csv").is_file() else []
        indexes = indexes or sorted(folder.glob("*/img_info.csv")) or sorted(folder.glob("*/*/img_info.csv"))
        if not indexes:
            raise UserError(f"--root {self.root} has no img_info.csv, nor has a folder in it")
        for path in indexes:
            city, before, at_root, below = path.parent.name, len(self.rows), None, ""
            for number, where, row in self.sized(path, csv_rows(path), 6):
                _, longitude, latitude, _, satellite, ground = row
                if at_root is None:  # paths start at the root or at the city's folder
                    at_root = not satellite.startswith(f"{city}/") and isfile(folder / satellite.strip())
                    below = "" if at_root else f"{path.parent.relative_to(folder).as_posix()}/"
                ground, satellite = (
                    name if at_root or name[:1] in ("", "/") else below + name.removeprefix(f"{city}/")
                    for name in (ground.strip(), satellite.strip())
                )
                place, name = (latitude, longitude), f"{city}-{number}"
                self.add(where, id=name, place=place, city=city, ground=ground, satellite=satellite)
            self.used(path, before)

    def vigor(self, split: str) -> None:
        """Read lists of panorama, positive and three semi-positives, each tile with its offset in pixels."""
        if "/" in split or not split:
            raise UserError(f"--vigor-split must be the name of a list such as {VIGOR_SPLIT}, got {split!r}")
        lists = [folder / f"{split}.txt" for folder in sorted(self.root.glob("splits*/*"))]
        lists = [path for path in lists if path.is_file()]
        if not lists:
            raise UserError(f"{self.root}/splits/<city>/{split}.txt does not exist for any city")
        by_kind = (self.root / "satellite").is_dir()  # the archives are sorted by city instead
        for path in lists:
            city, before = path.parent.name, len(self.rows)
            panoramas = f"ground/{city}/" if by_kind else f"{city}/panorama/"
            tiles = f"satellite/{city}/" if by_kind else f"{city}/satellite/"
            lines = ((number, line.split()) for number, line in lines_of(path) if line.strip())
            for _, where, words in self.sized(path, lines, 13):
                name, positive, *semi = words[0], *words[1::3]
                self.add(
                    where,
                    id=f"{city}-{name.split(',')[0]}",
                    place=name.split(",")[-3:-1],
                    city=city,
                    ground=panoramas + name,
                    satellite=tiles + positive,
                    semi=tuple(posixpath.normpath(tiles + tile) for tile in semi),
                    tile=positive.rpartition(".")[0].split("_")[1:],
                )
            self.used(path, before)

    def cvusa(self, manifest: Path | None) -> None:
        """Read lists of satellite, panorama, annotation; line N of all.csv has the coordinates of image N."""
        lists = [manifest] if manifest else [self.root / name for name in CVUSA_SPLITS]
        lists = [path for path in lists if path.is_file()]
        if not lists:
            raise UserError(f"{manifest or self.root / CVUSA_SPLITS[0]} does not exist")
        places = next((self.root / name for name in CVUSA_PLACES if (self.root / name).is_file()), None)
        if places is None:
            raise UserError(f"{self.root / CVUSA_PLACES[0]}, with the coordinates, does not exist")
        rows = [row for path in lists for row in self.sized(path, csv_rows(path), 3)]
        wanted = {_image_number(row[0]) for _, _, row in rows}
        known = {n: row[:2] for n, row in csv_rows(places) if n in wanted}  # N of the satellite tile
        for _, where, row in rows:
            satellite, ground = row[0].strip(), row[1].strip()
            name = posixpath.splitext(posixpath.basename(satellite))[0]
            place = known.get(_image_number(satellite), ())
            self.add(where, id=name, place=place, city=None, ground=ground, satellite=satellite)
        self.used(lists[0], 0)


def folded(name: str) -> str:
    """A city's name for comparisons: by NFC (one code for e and its accent), casefold and single spaces."""
    return " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).split())


def _text(value: Any) -> str:
    return "" if is_absent(value) else str(whole(value)).strip()


def _names(value: Any) -> Semi:
    """Split a list in a cell at ; or, without any, at white space."""
    if isinstance(value, list):
        return tuple(_text(name) for name in value)
    text = _text(value)
    parts = text.split(";") if ";" in text else text.split()
    return tuple(name.strip() for name in parts if name.strip())


def _degrees(point: Sequence[Any]) -> tuple[float, float] | None:
    """Latitude and longitude; None if they are not valid coordinates."""
    try:
        latitude, longitude = map(float, point)
    except (TypeError, ValueError):
        return None
    return (latitude, longitude) if is_coordinate(latitude, longitude) else None


def _inside(path: str) -> str | None:
    """The normalised path; None if it is absolute or leads out of its root."""
    if path.startswith("/") or "\0" in path:
        return None
    path = posixpath.normpath(path)
    return None if path in (".", "..") or path.startswith("../") else path


def _square(latitude: float, longitude: float) -> str:
    """The square degree around a point, named by its corner nearest to 0, 0: "37N122W"."""
    north, east = "NS"[latitude < 0], "EW"[longitude < 0]
    return f"{int(abs(latitude))}{north}{int(abs(longitude))}{east}"


def _image_number(path: str) -> int:
    """N if the image's name is like 000N.jpg, else 0."""
    name = posixpath.splitext(posixpath.basename(path.strip()))[0]
    return int(name) if name.isascii() and name.isdigit() and len(name) < 10 else 0
