"""Grades a completion of the task: strictly in its own format, tolerantly in other people's styles.

    strict    <reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>
    tolerant  First, 12 apples + 30 apples = **42** apples. Then $42 − 5 = 37$. The answer is 37.

Both refuse a trace with a false equation or a number from nowhere, and one that does not end in the answer.
Time is linear in the length of the text, and only ASCII digits are digits.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
MAX_CHARS = 20_000  # a longer completion is wrong by definition: nobody asked for it
UNITS = {"dozen": 12, "week": 7}  # sizes that a trace may use where the question names the unit


# The strict grammar: canonical numbers, single blanks.
_COUNT = r"(0|[1-9][0-9]{0,11})"
_EQUATION = re.compile(rf"{_COUNT} ([-+*/]) {_COUNT} = {_COUNT}")
_FORMAT = re.compile(r"(?s)\s*<reasoning>(.*)</reasoning>\s*<answer>\s*(0|-?[1-9][0-9]{0,11})\s*</answer>\s*")

# What looks like a number, and a whole one: 1000, 1,000 or 1000.00, but not 10.5 or 1,00.
_NUMBER = r"(?<!\d)-?[.,]?\d(?:[\d.,]*\d)?+"
_WHOLE = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})(?:\.0{1,6})?")
_GIVEN = rf"[\s:=$\\(]{{0,6}}({_NUMBER}(?:[A-Za-z ]{{0,30}}\bor {_NUMBER})?+)"  # 37; "37 or 38" is two numbers
_MARKS = (  # what announces an answer, the surest first; the answer tags come before them
    re.compile(r"\\boxed\{([^}]{0,99})"), re.compile("####" + _GIVEN),
    # In "the answer is 12 + 30 = 42" the last number is meant.
    re.compile(rf"\b[Aa]nswer(?: is)?{_GIVEN}(?! ?[-+*/]|[^.;\n]{{0,80}}=)"),
)  # fmt: skip

# Turns other styles into plain equations, in this order. ";" ends an equation, "^" makes it unreadable,
# "@" is a side that is a name.
_PLAIN = [(re.compile(pattern, re.MULTILINE), plain) for pattern, plain in (
    (r"</?(?:reasoning|answer)>|\\[]\\)]", ";"),
    (r"[−–]", "-"), (r"[×·⋅]|\\times|\\cdot", "*"), (r"÷|\\div", "/"), (r"^[ \t]*[-*•][ \t]+", ""),  # a bullet
    (r"([0-9]) ?\*\* ?(?=[0-9])", r"\1^"),  # a power; other double stars are bold type
    (r"\*\*|\\(?:text|textbf|mathrm|mathbf|boxed)\{|\\[\[($,;! ]|[{}$£€&]", " "),
    (r"[^\S\n]+", " "),
    (r"(?<=\w)[-/](?=[A-Za-z])|(?<=[A-Za-z]) ?[-+*/] ?(?=[A-Za-z])", " "),  # a 12-pack, apples + pears
    (r"(?<=[0-9 ])[xX](?= ?[0-9])", "*"),
    (r"(?<=[0-9]) ?(?:[+*/] ?(?=[A-Za-z])|-[A-Za-z ]{1,30}=)", "^="),  # 7 * so 12 + 30 = 42; 42 - five = 37
    (r"(?<=[0-9])[^\W\d]+(?=[0-9])|\\[A-Za-z]*", "^"),  # 42e3, \sqrt{42}
    (r"[.,](?![0-9])|-(?= ?[A-Za-z])|\b(?:so|and|then|thus|hence|therefore)\b", ";"),
    (r"([-+*/] ?[0-9.,]{1,20}) (?:is|are|equals|gives|makes) (?=[0-9])", r"\1 = "),
    (r"(?:^|[;:])[A-Za-z ]{1,60}\b(?:of|for|in|after) [0-9]{1,12} [A-Za-z ]{1,30}=", ";@="),  # cost of 3 pens =
    (r"(?<=[0-9])[A-Za-z ]{1,30}(?=[-+*/^%=])", " "),  # 12 apples + 30 apples
    (r"= ?[A-Za-z][A-Za-z ]{0,30}=", "="), (r"[A-Za-z] ?=", "@="),  # left = apples given = 42 - 5
)]  # fmt: skip
_CHAIN = re.compile(r"[-+*/^%@=0-9., ]+")
_TOKEN = re.compile(r"[0-9.,]+|[^0-9., ]")


@dataclass(frozen=True)
class Grade:
    """How a completion did. ``strict`` (format, answer and trace) is what the workbook reports."""

    format: bool  # exactly the two blocks, a canonical integer in the second
    answer: int | None  # the one given, in any style; None if there is none or there are two
    correct: bool  # the answer is right, in any style
    trace: bool  # the equations are true, use known numbers and end in the answer given, in any style
    strict: bool  # format, correct and trace, and the reasoning is nothing but plain equations


def apply(op: str, left: int, right: int) -> int:
    """The result of an equation; -1 for a division that leaves a remainder."""
    if op == "/":
        return left // right if right and left % right == 0 else -1
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _whole(number: str) -> int | None:
    return int(number.partition(".")[0].replace(",", "")) if _WHOLE.fullmatch(number) else None


def parse_answer(text: str) -> int | None:
    r"""The answer in any style: what the answer tags hold, else what \boxed{}, #### or "the answer is"
    announces, else the last number. Two different announced answers are none: hedging must not pay.
    "1,000" and "7.0" are 1000 and 7; "7.5", "1,00" and "7 or 8" between answer tags are None.
    """
    text = text.replace("−", "-").replace("–", "-").replace("**", " ")
    tagged = [piece.partition("</answer>")[0] for piece in text.split("<answer>")[1:]]
    announced = next(filter(None, (tagged, *(mark.findall(text) for mark in _MARKS))), None)
    found = [re.findall(_NUMBER, piece) for piece in announced or re.findall(_NUMBER, text)[-1:]]
    values = {_whole(numbers[0]) if len(numbers) == 1 else None for numbers in found}
    return values.pop() if len(values) == 1 else None


@lru_cache(maxsize=1024)
def _known(question: str) -> frozenset[int]:
    """The numbers that a trace may start from: the question's, and the sizes of its units."""
    numbers = {abs(_whole(number) or 0) for number in re.findall(_NUMBER, question)}
    return frozenset(numbers | {size for unit, size in UNITS.items() if unit in question})


def check_strict(reasoning: str, question: str, answer: int) -> bool:
    """True for ``12 + 30 = 42; 42 - 5 = 37`` and the answer 37, and for nothing that looks different."""
    known, result = set(_known(question)), None
    for piece in reasoning.split("; "):
        if not (equation := _EQUATION.fullmatch(piece)):
            return False
        left, right, result = int(equation[1]), int(equation[3]), int(equation[4])
        if not {left, right} <= known or apply(equation[2], left, right) != result:
            return False
        known.add(result)
    return result == answer


def check_trace(text: str, question: str, answer: int | None) -> bool:
    """True if a text in any style holds equations, all true, on known numbers, the last with the answer.

    ``7 * 12 + 30 = 114`` is true and makes 84 known too, ``12 + 30 = 42 - 5 = 37`` is false. What cannot be
    read for sure counts as false: a sign before a number, brackets in an equation, other scripts' digits.
    """
    if answer is None or (not text.isascii() and any(c > "9" and c.isnumeric() for c in text)):
        return False
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    known, result = set(_known(question)), None
    for chain in (run for run in _CHAIN.findall(text) if "=" in run):
        results: set[int] = set()
        sides = [_TOKEN.findall(side) for side in chain.split("=")]
        values = {_value(side, known, results) for side in sides if side != ["@"]}
        if len(values) > 1 or None in values or not (results or values <= known):
            return False
        result = values.pop() if results else result
        known |= results
    return result is not None and result == answer


def _value(tokens: list[str], known: set[int], results: set[int]) -> int | None:
    """The value of ``7 * 12 + 30``, 114, while ``results`` gets 84 and 114. None if an operand is not known."""
    numbers, operators = [_whole(number) for number in tokens[::2]], tokens[1::2]
    if None in numbers or len(numbers) != len(operators) + 1 or len(operators) > 20:
        return None
    if operators and not known.issuperset(numbers):
        return None
    for signs in ("*/", "+-"):  # the usual precedence
        left, waiting = numbers[:1], []
        for operator, number in zip(operators, numbers[1:], strict=True):
            if operator in signs:
                number = apply(operator, left.pop(), number)
                results.add(number)
            else:
                waiting.append(operator)
            left.append(number)
        numbers, operators = left, waiting
    return None if operators or min(results, default=0) < 0 else numbers[0]


def grade(completion: str, question: str, answer: int) -> Grade:
    """Grades one completion against the question and its right answer, in linear time."""
    for says, value, kind in (("a completion is a str", completion, str), ("a question is a str", question, str),
                              ("an answer is an int", answer, int)):  # fmt: skip
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{says}, not {type(value).__name__}: {value!r:.80}")
    if len(completion) > MAX_CHARS:
        return Grade(False, None, False, False, False)
    return _grade(completion, question, answer)


@lru_cache(maxsize=8192)  # several reward functions look at the same completion
def _grade(completion: str, question: str, answer: int) -> Grade:
    match = _FORMAT.fullmatch(completion) if all(completion.count(tag) == 1 for tag in TAGS) else None
    tagged = bool(match and match[1].strip())
    given = int(match[2]) if tagged else parse_answer(completion)
    correct = given is not None and given == answer
    exact = tagged and check_strict(match[1], question, given)
    trace = exact or check_trace(match[1] if tagged else completion, question, given)
    return Grade(tagged, given, correct, trace, exact and correct)
