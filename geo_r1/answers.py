"""Read the answer in a completion as a person would. Standard library only."""

import re

Mention = tuple[int, bool, bool]  # number of the choice, from 1; asserted; rejected

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
DEFAULT_NUM_CHOICES = 5
MOST_READ = 4096  # characters; of a longer answer only the end, with the conclusion, is read

_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)

# The words that extract_choice knows. Text is lower-cased before the search.
_NOUN = r"(?:options?|choices?|candidates?|images?|images?|photos?|views?|tiles?|letters?)"
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_MARKED = re.compile(r"""(?<![\w*`"$'])[*_`"$']+\s*(\w)\s*[*_`"$']+(?!\w)""")  # **c**, `c`, "c"
_REASON = r"\b(?:because|since|given that|whereas|while|unlike|although|though)\b"
_REASON_FIRST = re.compile(rf"((?:^|[.;\n])\s*){_REASON}[^,.;\n]*")  # "since a is too far, c"
_REASON_LAST = re.compile(rf"{_REASON}[^.;\n]*")  # "c because a is too far"
_ANSWER_CUE = re.compile(r"\banswer\s*(?:(?:is|would be|must be|should be)\b\s*[:=]?|[:=])\s*")
_TOKEN = re.compile(
    r"(?<![\w.'&-])(?P<plain>[a-z]|\d{1,2})(?![\w'&-]|\.\w)"
    rf"|\b(?P<ordinal>{'|'.join(_ORDINALS)}|last|\d{{1,2}}(?:st|nd|rd|th))\b"
    rf"(?=(?P<named>\s+(?:(?:satellite|aerial|candidate)\s+)?(?:{_NOUN}|one)\b|\W*$)|\s*(?:,|/|and\b|or\b))"
)
_NAMED = re.compile(rf"\b{_NOUN}\s*(?:number|no\.|#|:)?\s*[(\[]?$|#$")
_CLAUSE_START = re.compile(r"(?:^|[.,;:!?\n=>–—-])\s*[(\[]?$")
_LEAD = re.compile(
    r"\b(?:is|be|it's|as|with|for|to|match|matches|choose|chose|pick|select|say|think|believe|guess|so|thus|"
    r"hence|therefore|clearly|definitely|probably|likely|but|not|or|and|nor|either|neither|both|only|also|than|"
    r"answer)\s+[(\[]?$"
)
_JOIN = re.compile(rf"[\s)\]]*(?:,|/|&|\bor\b|\band\b|\bnor\b)(?:[\s,(\[#]|or\b|and\b|nor\b|the\b|{_NOUN})*")
_NEGATED_BEFORE = re.compile(
    r"(?:\b(?:not(?! only)|never|cannot|none|neither|nor|except|rather than|instead of|ruled? out)|n't)\b"
)
_NEGATED_AFTER = re.compile(
    r"[\s)\]]*(?:cannot|(?:is|was|are|does|do|did|can|could|would|has|looks?|seems?)"
    r"(?:n't|\s+(?:not|too|wrong|incorrect|ruled|excluded|eliminated|unlikely|impossible)))\b"
)
# The text after the letter A (or I) if it is a choice and not the English word.
_AFTER_A = re.compile(
    r"\s*(?:$|[^\w\s]|[a-z]\b|(?:is|isn't|was|or|and|nor|but|as|does|doesn't|matches|fits|shows|rather|instead)\b)"
)
_AFTER_I = re.compile(r"\s*(?:$|[.:;!?)\]/]|is\b)")


def well_formed(text: str) -> bool:
    """Whether a text is only a think block, optional white space and a non-empty answer block."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    before, _, rest = text.partition("<think>")
    _, closed, rest = rest.partition("</think>")
    between, opened, rest = rest.partition("<answer>")
    answer, ended, after = rest.partition("</answer>")
    blank = not (before.strip() or between.strip() or after.strip())
    return bool(closed and opened and ended and blank and answer.strip())


def extract_answer(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>` block, stripped; None without one."""
    blocks = _ANSWER.findall(text)
    return blocks[-1].strip() if blocks else None


def said(text: str) -> str:
    """A completion's answer: its answer block, else the text after the last thought, else the whole text.

    Empty if a block or a thought is left open: a completion that was cut off is not an answer.
    """
    if "<answer>" in text:
        return extract_answer(text) or ""
    if "<think>" in text or "</think>" in text:
        return text.rpartition("</think>")[2].strip() if "</think>" in text else ""
    return text.strip()


def extract_choice(text: str, num_choices: int = DEFAULT_NUM_CHOICES) -> str | None:
    """The choice letter, upper case, that a person would read from an answer; None if in doubt.

    Only the last answer block counts. A text with tags but no such block has no answer; a text without tags
    is read whole. Each letter, number ("image 3") or ordinal ("the third image") that can be a choice is
    judged by the words around it: rejected ("not D", "A is too far"), asserted (named, bracketed, or placed
    like an answer), or mentioned in passing. The answer is the one asserted choice; a second choice that is
    not rejected, in range or not, is doubt. Clauses of reason ("because A ...") and the text before the last
    "answer is" are not read. "a" and "I" are choices only if they cannot be English words.

    Args:
        text: a completion, or only its answer.
        num_choices: 2 to 26; choices are the first letters of the alphabet.

    Raises:
        ValueError: num_choices is outside 2 to 26.
    """
    if not 2 <= num_choices <= 26:
        raise ValueError(f"num_choices: got {num_choices}, expected 2 to 26")
    if any(tag in text for tag in TAGS):
        text = extract_answer(text) or ""
    text = text[-MOST_READ:].lower().replace("’", "'").replace("“", '"').replace("”", '"').strip()
    text = re.sub(r"\\(?:boxed|text)\s*\{([^{}]*)\}", r"(\1)", text)  # \boxed{c}
    text = re.sub(r"(?<!\w)'|'(?!\w)|[*_`\"$]", " ", _MARKED.sub(r"(\1)", text)).strip()
    text = _REASON_LAST.sub("", _REASON_FIRST.sub(r"\1", text))
    tail = text[max((cue.end() for cue in _ANSWER_CUE.finditer(text)), default=0) :]
    return _only_choice(_judge(tail, num_choices), num_choices)


def _judge(text: str, num_choices: int) -> list[Mention]:
    """List the choices in a text as (number from 1, asserted, rejected), in order."""
    mentions: list[Mention] = []
    end = 0  # of the previous mention
    for token in _TOKEN.finditer(text):
        start, gap = token.start(), text[end : token.start()]
        before, after = text[max(0, start - 40) : start], text[token.end() :][:40]  # keeps long texts linear
        joined = bool(mentions) and _JOIN.fullmatch(gap) is not None
        asserted = _is_asserted(token, before, after, joined)
        if asserted is None:
            continue
        clause = re.split(r"[.;:,!?\n]|\bbut\b", gap)[-1]
        rejected = bool(_NEGATED_BEFORE.search(clause) or _NEGATED_AFTER.match(after))
        rejected = rejected or (joined and mentions[-1][2])  # "not A or B" rejects both
        mentions.append((_number(token, num_choices), asserted, rejected))
        end = token.end()
    return mentions


def _is_asserted(token: re.Match[str], before: str, after: str, joined: bool) -> bool | None:
    """True for a token placed like an answer, False for one in passing, None for one that is no choice."""
    if token["ordinal"]:
        return token["named"] is not None
    word = token["plain"]
    if word.isdigit():  # a bare number is a count unless it is named, a label or the whole text
        label = not before.strip("([ ") and re.match(r"[,.:;)\]]+(?!\S)|\s*$", after)
        return True if _NAMED.search(before) or label or joined else None
    bracketed = re.search(r"[(\[]\s*$", before) and re.match(r"\s*[)\]]", after)
    if not bracketed and (
        (word == "a" and not _AFTER_A.match(after)) or (word == "i" and not _AFTER_I.match(after))
    ):
        return None
    places = (_NAMED, _CLAUSE_START, _LEAD)
    return bool(bracketed or joined or any(place.search(before) for place in places))


def _number(token: re.Match[str], num_choices: int) -> int:
    """The number, from 1, of the choice that a token names; it may be out of range."""
    word = token["plain"] or token["ordinal"]
    if word == "last":
        return num_choices
    if word in _ORDINALS:
        return _ORDINALS.index(word) + 1
    return int(re.sub(r"\D", "", word)) if word[0].isdigit() else ord(word) - ord("a") + 1


def _only_choice(mentions: list[Mention], num_choices: int) -> str | None:
    """The letter of the only choice left after rejections, if it is asserted and in range."""
    left = {number for number, _, rejected in mentions if not rejected}
    rejected_numbers = {number for number, _, rejected in mentions if rejected}
    if len(left) != 1 or left & rejected_numbers:
        return None
    number = left.pop()
    asserted = any(is_asserted for other, is_asserted, _ in mentions if other == number)
    return chr(ord("A") + number - 1) if asserted and 1 <= number <= num_choices else None
