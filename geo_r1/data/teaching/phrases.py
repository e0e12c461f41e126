"""Patterns for words that identify or reject a place, and for traffic; all take linear time."""

from __future__ import annotations

import re

SENTENCE = re.compile(r"(?<!\bSt\.)(?<!\bMt\.)(?<!\bFt\.)(?<!\b[A-Z]\.)(?<=[.!?;])\s|\n")
CLAUSE = re.compile(r",\s|\s[–—-]\s|:\s|;|\b(?:but|while|whereas|although|though)\b")
WORD = re.compile(r"[^\W_](?:[\w'’-]|\.(?=\w))*\.?")

# A subject and a verb, or a word of inference, identifies a place; small words may precede the name.
SUBJECT = (
    r"(?:this|it|that|which|we|here|place|city|town|country|continent|scene|location|photo|photograph|picture|"
    r"image|panorama|view|street|camera|capital|coordinates|area|region|site|spot)"
)
BE = r"(?:is|are|was|were|be|being|lies?|lay|stands?|stood|sits?|belongs?|comes? from|came from)"
INFER = (
    r"(?:suggests?|indicates?|means|meaning|confirms?|implies|proves?|conclude|deduce|infer|believe|"
    r"identif(?:y|ies)|favou?rs?|locates?|places?|puts?|settles?|leaves?|adds? up|points?|leads?|speaks?|"
    r"narrows?|consistent|typical|characteristic|so(?! (?:is|are|was|were|do|does)\b)|hence|thus|therefore|"
    r"then|must be|found|taken|shot|located|situated|recogni[sz]e|clearly|surely|certainly)"
)
SMALL = (
    r"(?:in|at|near|of|to|for|on|towards?|within|inside|outside|that|the|a|an|as|with|it|us|me|this|be|is|"
    r"are|was|only|indeed|must|by|very|most|quite|somewhere|city|town|country|capital|continent|coast|centre|"
    r"center|heart|outskirts|suburbs?|middle|north|south|east|west|northern|southern|eastern|western|central|"
    r"part|side|called|named|located|situated|found|taken|shot|made|typical|characteristic|clearly|certainly|"
    r"surely|definitely|photograph|picture|scene|place|location|conclusion|about|around|approximately|together|"
    r"almost|likely|probably|presumably|looking|dealing|street|one|nations?|countries|cities|state|region)"
)
IDENTIFIED = re.compile(
    rf"(?:\b(?:{SUBJECT}(?:'s|’s|\s+(?:\w+\s+){{0,3}}?{BE})|{INFER})"
    r"|(?:^|[:;*#-]\s*)(?:continent|country|city|location|place):)(?!\w)(?=(?P<gap>.*)$)",
    re.IGNORECASE | re.DOTALL,
)
_KNOWN = rf"(?:\s+|,|{SMALL}\b|[-+]?\d[\d.]*°?|[°NSEW(){{}}′″'\"]|:)*"
GAP = re.compile(
    rf"{_KNOWN}(?:(?!(?:from|between|beyond)\b)[a-z-]+\b{_KNOWN})?",  # and one other word: "so sunny Spain"
    re.IGNORECASE,
)
BEHIND = re.compile(
    r"\s+(?:it is|it must be|is (?:\w+ )?where|"
    r"(?:is )?the (?:most \w+ )?(?:place|city|country|answer|choice))\b",
    re.IGNORECASE,
)
ASIDE = re.compile(
    r"\b(?:not|cannot|never|no|nobody|none|neither|nor|unlike|rather than|instead of|except|exclud\w+|"
    r"rul(?:es?|ed|ing) out|different from|differs? from|distinct from|similar to|like|resembl\w+|"
    r"reminiscent|compared?|could|might|may|would(?! (?:say|therefore|place|put|locate|conclude))|perhaps|"
    r"possibly|maybe|either|whether|candidates?|if|than|elsewhere|other|also|too|twinned|named after|"
    r"imported|exported|neighbou?r\w*|border\w*|flights?|ferr(?:y|ies))\b|n't\b"
)
DENIED = re.compile(
    r"\s*(?:\([^)]{0,40}\)\s*)?(?:, (?:where|which|whose) [^,.]{0,60},\s*)?(?:and \w+ )?"
    r"(?:(?:is|are|was|were|seems?|looks?|can|would|could|might|may)\b|n't|not\b|too\b|ruled out\b|"
    r"excluded\b|unlikely\b|perhaps\b|maybe\b|possibly\b|have\b|has\b|lacks?\b|use[sd]?\b|drops?\b|falls?\b|fails?\b|"
    r",? ?(?:but|yet|though|however)\b)"
)
CITY_CUE = re.compile(
    r"\b(?:in|near|at|of|is|as|be|from|around|outside|inside|downtown|central|greater|towards?|to|"
    r"city|town|suggests?|indicates?|identif\w+|matches|confirms?|means|deduce|so|hence|thus|for|capital)\s+"
    r"(?:the\s+city\s+of\s+)?$",
    re.IGNORECASE,
)
LIST = re.compile(r"(?:[,/]|\s|and\b|or\b|the\b)+")
PAIRED = re.compile(r",? (?:in |the )?")  # "Lyon, France", "Okara in Pakistan"
# "an Asian city" is a claim, "Asian food" is not
CONTINENT_OF = {"African": "Africa", "Asian": "Asia", "European": "Europe", "North American": "North America"}
CONTINENT_OF |= {"South American": "South America", "Oceanian": "Oceania"}
KIND_OF_PLACE = re.compile(r"\s+(?:continent|city|town|country|nation|capital|metropolis|port)\b")
PEOPLE = re.compile(r"\w\W+[A-Z]\w+\s+$")  # "while Italians" (drive on the right)
TAIL = re.compile(r",? (?:in )?([A-Z][\w'’ -]{2,40})")
# City names that mean something else in prose: words, months, makes of cars, styles, parts of names.
COMMON = """
a an the this that these those here there it he she we you they both same most many other others such
all some tile tiles image images panorama picture photo view views visual cues knowledge evidence
conclusion step answer option candidate north south east west northern southern eastern western central
nice reading mobile bath orange split normal surprise union best bar date deal enter man men male march
may april june august sunday monday friday street road avenue park river lake mount mountain bay beach
port fort new old san santa saint toyota ford lincoln mercedes shell total kia tesla roman gothic art
christian catholic buddhist english spanish french german university college hospital police post office
school church temple cars vehicles buses taxis trams signs castle tower bridge market station airport of
so no yes if then thus because while when where its his her
"""
NO_CITY = frozenset(COMMON.split())
OF_A_NAME = ("New", "Little", "Old")  # New Guinea is not Guinea

HEMISPHERE = (
    re.compile(r"\b(northern|southern|eastern|western)[ -]hemisphere\b", re.IGNORECASE),
    re.compile(
        r"\b(northern|southern|eastern|western) half of the (?:globe|world|earth|planet)\b", re.IGNORECASE
    ),
    re.compile(r"\b(north|south|above|below) (?:of )?the equator\b", re.IGNORECASE),
)
NORTH_OR_EAST = ("northern", "north", "above", "eastern")
TRAFFIC = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bdriv(?:e|es|en|ing)\s+(?:\w+\s+){0,3}on\s+the\s+(left|right)\b",
        r"\b(?:traffic|vehicles?|cars?|buses|drivers|motorists)\s+(?:\w+\s+){0,2}"
        r"(?:keeps?|keeping|stays?|moves?|moving|runs?|running|travels?|travelling|traveling)\s+"
        r"(?:(?:on|to|along)\s+)?(?:the\s+)?(left|right)\b",
        r"\b(left|right)[ -]hand[ -](?:traffic|driving)\b",
        r"\btraffic\s+(?:is\s+)?on\s+the\s+(left|right)\b",
        r"\bkeeps?\s+(?:to\s+the\s+)?(left|right)\b",
        r"\b(left|right)[ -]side\s+driving\b",
    )
)
