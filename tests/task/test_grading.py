"""The grader: right traces pass in every style, false ones in none, and hostile text takes no time."""

import ast
import operator
import random
import re
import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest

from rlnb.task import problems
from rlnb.task.grading import TAGS, UNITS, Grade, grade, parse_answer

QUESTION = (
    "Mia has 12 apples. She gets 30 more and gives 5 to Leo. How many apples does she have left?"
)
GOLD = "<reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>"
DRAWN = [problems.draw(kind, random.Random(f"{kind}-{i}"), larger=i % 4 == 0, new=i % 3 == 0)
         for kind in problems.KINDS for i in range(12)]  # fmt: skip


def strict(text: str) -> bool:
    return grade(text, QUESTION, 37).strict


def tagged(pieces, answer) -> str:
    return f"<reasoning>{'; '.join(pieces)}</reasoning><answer>{answer}</answer>"


# --- what is true: a small oracle that shares no line with the grader ------------------------------

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value(node: ast.expr, known: set, results: list) -> Fraction:
    """The value of an expression. Raises ValueError for what the task does not allow."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError("no arithmetic")
    left, right = (value(side, known, results) for side in (node.left, node.right))
    if any(
        isinstance(n, ast.Constant) and value(n, known, []) not in known
        for n in (node.left, node.right)
    ):
        raise ValueError("a number from nowhere")
    found = OPERATORS[type(node.op)](left, right)
    if found < 0 or found.denominator != 1:
        raise ValueError("below zero or broken")
    results.append(found)
    return found


def is_true(pieces, answer, problem) -> bool:
    """Whether the pieces are true equations of known numbers that end in the right answer."""
    known, last = {*problem.numbers.values(), *UNITS.values()}, None
    try:
        for piece in pieces:
            if "=" not in piece:
                continue  # claims nothing
            results = []
            sides = [
                value(ast.parse(s.strip(), mode="eval").body, known, results)
                for s in piece.split("=")
            ]
            if len(set(sides)) != 1 or len(sides) < 2 or not results:
                return False
            known |= set(results)
            last = sides[0]
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    return str(answer) == str(last) == str(problem.answer)


# --- false traces --------------------------------------------------------------------------------
# Each takes the equations as [left, operator, right, result], the answer and a random generator, and
# gives the pieces of the reasoning and what stands between the answer tags.


def text_of(steps) -> list[str]:
    return ["{} {} {} = {}".format(*step) for step in steps]


def in_a_piece(change):
    """A mutation of the text of one equation: change(left, operator, right, result, rng)."""

    def mutate(steps, answer, rng):
        pieces, i = text_of(steps), rng.randrange(len(steps))
        pieces[i] = change(*steps[i], rng)
        return pieces, answer

    return mutate


def carried_on(steps, answer, rng):
    """A wrong result with which all later equations go on."""
    steps[0][3] = renamed = steps[0][3] + rng.choice([-10, -1, 1, 10, 100])
    for before, step in pairwise(steps):
        step[0] = before[3] if rng.random() < 0.8 else step[0]
        step[3] = problems.apply(step[1], step[0], step[2])
    return text_of(steps), rng.choice([answer, steps[-1][3], renamed])


def another_operator(steps, answer, rng):
    """A true equation of the wrong operation."""
    step = rng.choice(steps)
    step[1] = rng.choice([op for op in "+-*/" if op != step[1]])
    step[3] = problems.apply(step[1], step[0], step[2])
    return text_of(steps), rng.choice([answer, steps[-1][3]])


def from_nowhere(steps, answer, rng):
    """A true equation with a number that nobody gave."""
    step, place = rng.choice(steps), rng.choice([0, 2])
    step[place] += rng.choice([1, 2, 10, 1000])
    step[3] = problems.apply(step[1], step[0], step[2])
    return text_of(steps), rng.choice([answer, steps[-1][3]])


def dropped(steps, answer, rng):
    steps.pop(rng.randrange(len(steps)))
    return text_of(steps), answer


def reordered(steps, answer, rng):
    rng.shuffle(steps)
    return text_of(steps), answer


def guessed_backwards(steps, answer, rng):
    """An equation that leads to the answer from made-up numbers."""
    made_up = rng.randrange(1, 50)
    return [f"{answer + made_up} - {made_up} = {answer}"], answer


def one_more(steps, answer, rng):
    """A true equation after the end."""
    return [*text_of(steps), text_of([rng.choice(steps[:-1] or steps)])[0] + " = 0"], answer


def earlier_result(steps, answer, rng):
    return text_of(steps), rng.choice(
        [steps[0][0], steps[0][2], steps[0][3], answer + 1, answer * 10]
    )


def dropped_last(steps, answer, rng):
    return text_of(steps[:-1]), answer


def run_on(steps, answer, rng):
    """12 + 30 = 42 - 5 = 37"""
    rest = "".join(f" {op} {right} = {result}" for _, op, right, result in steps[1:] or steps)
    return [text_of(steps)[0] + rest], answer


def digits(n, rng, change):
    """A number with one digit changed by change(digit)."""
    text, i = str(n), rng.randrange(len(str(n)))
    return text[:i] + change(text[i]) + text[i + 1 :]


FALSE = {
    "wrong result": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r + rng.choice([-10, -1, 1, 10, 100])}"),
    "wrong result, carried on": carried_on,
    "swapped operands of - or /": in_a_piece(lambda a, op, b, r, rng: f"{b} {op} {a} = {r}"),
    "wrong operator": in_a_piece(lambda a, op, b, r, rng: f"{a} {rng.choice('+-*/')} {b} = {r}"),
    "another operation": another_operator,
    "number from nowhere": from_nowhere,
    "number from nowhere, both": guessed_backwards,
    "dropped step": dropped,
    "dropped last step": dropped_last,
    "reordered steps": reordered,
    "no step": lambda steps, answer, rng: ([], answer),
    "something after the end": one_more,
    "doubled minus": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} -{rng.choice(['', ' '])}{b} = {r}"),
    "doubled plus": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} +{rng.choice(['', ' '])}{b} = {r}"),
    "negative operand": in_a_piece(lambda a, op, b, r, rng: f"-{a} {op} {b} = {r}"),
    "negative operand, true": in_a_piece(lambda a, op, b, r, rng: f"-{a} + {a + r} = {r}"),
    "negative result": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = -{r}"),
    "negative result, true": in_a_piece(lambda a, op, b, r, rng: f"{b} - {a + b} = -{a}"),
    "decimal result": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r}.{rng.randrange(1, 10)}"),
    "decimal operand": in_a_piece(lambda a, op, b, r, rng: f"{a}.5 {op} {b} = {r}"),
    "shifted point": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r / 10}"),
    "small decimal": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = .{r}"),
    "remainder": in_a_piece(lambda a, op, b, r, rng: f"{a * b + 1} / {b} = {a}"),
    "chained false equality": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r} = {r + rng.randrange(1, 99)}"),
    "chained, false first": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r + rng.randrange(1, 99)} = {r}"),
    "run-on chain": run_on,
    "false reversed": in_a_piece(lambda a, op, b, r, rng: f"{r + rng.randrange(1, 99)} = {a} {op} {b}"),
    "half of an equation before": in_a_piece(lambda a, op, b, r, rng: f"{rng.choice([a, b])} * {a} {op} {b} = {r}"),
    "half of one and a word": in_a_piece(lambda a, op, b, r, rng: f"{b} {rng.choice('+*/')} so {a} {op} {b} = {r}"),
    "half of an equation after": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r} {rng.choice('+-')} {a}"),
    "thousands in the wrong place": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r // 10},{r % 10}"),
    "thousands in an operand": in_a_piece(lambda a, op, b, r, rng: f"{a // 10},{a % 10} {op} {b} = {r}"),
    "blank in a number": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r // 10} {r % 10}"),
    "other digits": in_a_piece(
        lambda a, op, b, r, rng: f"{a} {op} {b} = " + digits(r, rng, lambda d: chr(ord(d) + rng.choice([65248, 1584])))
    ),
    "superscript": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r}{rng.choice('²³½')}"),
    "power": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r}{rng.choice([' ^ ', '^', '**', ' ** '])}2"),
    "power that is not bold": in_a_piece(lambda a, op, b, r, rng: f"{a} ** {b} = {b}"),
    "exponent": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r}e{rng.randrange(1, 9)}"),
    "per cent": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = {r}%"),
    "root": in_a_piece(lambda a, op, b, r, rng: f"\\sqrt{{{a}}} {op} {b} = {r}"),
    "brackets that change it": in_a_piece(lambda a, op, b, r, rng: f"({a} + {b}) * {a} = {a + b * a}"),
    "brackets as a product": in_a_piece(lambda a, op, b, r, rng: f"{a}({a} {op} {b}) = {r}"),
    "missing left number": in_a_piece(lambda a, op, b, r, rng: f"{op} {b} = {r}"),
    "missing right number": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} = {r}"),
    "missing operator": in_a_piece(lambda a, op, b, r, rng: f"{a} {b} = {r}"),
    "missing result": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} ="),
    "missing equals sign": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} {r}"),
    "other equals sign": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} {rng.choice(['==', '!=', '=>'])} {r}"),
    "false in words": in_a_piece(lambda a, op, b, r, rng: f"no, {a} {op} {b} is {r + rng.randrange(1, 99)}"),
    "word for a number": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} five = {r}"),
    "digit doubled": in_a_piece(lambda a, op, b, r, rng: f"{a} {op} {b} = " + digits(r, rng, lambda d: d + d)),
    "digit lost": in_a_piece(lambda a, op, b, r, rng: f"{digits(a, rng, lambda d: '')} {op} {b} = {r}"),
    "nothing divided": in_a_piece(lambda a, op, b, r, rng: f"{a} / 0 = {r}"),
    "answer is not the last result": earlier_result,
    "sign of the answer": lambda steps, answer, rng: (text_of(steps), -answer),
    "two answers": lambda steps, answer, rng: (text_of(steps), f"{answer}</answer><answer>{answer + 1}"),
    "two answers in one": lambda steps, answer, rng: (text_of(steps), f"{answer} or {answer + 1}"),
    "decimal answer": lambda steps, answer, rng: (text_of(steps), f"{answer}.5"),
    "answer in other digits": lambda steps, answer, rng: (text_of(steps), digits(answer, rng, lambda d: "\uff13")),
    "no answer": lambda steps, answer, rng: (text_of(steps), ""),
}  # fmt: skip


WRAPS = [("", "; "), ("", "\n"), ("So ", ". "), ("Work: ", ", so "), ("- ", "\n- "), ("* ", "\n* "), ("1. ", "\n2. "),
         ("First, ", ", then "), ("Here it is.\n\n", " and "), ("Step 1: ", "\nStep 2: ")]  # fmt: skip
ENDS = [
    " <answer>{}</answer>",
    "\nThe answer is {}.",
    "\n#### {}",
    "\n\\boxed{{{}}}",
    "\nAnswer: **{}**",
]


def wrapped(pieces, answer, rng) -> str:
    """The pieces in a style that leaves each of them as it is."""
    if answer == "":
        return tagged(pieces, answer)  # without tags the last number is the answer
    lead, mark = rng.choice(WRAPS)
    return lead + mark.join(pieces) + rng.choice(ENDS).format(answer)


@pytest.mark.filterwarnings("ignore:invalid")  # how the oracle refuses 42e
def test_ten_thousand_false_traces():
    """Every kind of mutation, in the strict format and in other styles; the oracle says that each is false."""
    rng, cases, accepted = random.Random(0), Counter(), []
    while cases.total() < 10_000:
        name = rng.choice([*FALSE])
        problem = rng.choice(DRAWN)
        steps = [[int(a), op, int(b), int(r)] for a, op, b, _, r in map(str.split, problem.trace)]
        pieces, answer = FALSE[name](steps, problem.answer, rng)
        if is_true(pieces, answer, problem):
            continue  # such as two steps in another order
        cases[name] += 1
        for text in (tagged(pieces, answer), wrapped(pieces, answer, rng)):
            found = grade(text, problem.question, problem.answer)
            if found.strict or (found.correct and found.trace):
                accepted.append((name, text, problem.question))
    assert accepted == []
    assert set(cases) == set(FALSE) and min(cases.values()) >= 30, cases


# --- right traces --------------------------------------------------------------------------------


def numbers(written, text: str) -> str:
    """Every number of a text as written(number) has it."""
    return re.sub("[0-9]+", lambda match: written(int(match[0])), text)


def lines(lead: str, pieces, answer, end="") -> str:
    return "".join(f"{lead}{piece}{end}\n" for piece in pieces) + f"The answer is {answer}."


def turned(piece: str) -> str:
    """42 = 12 + 30"""
    return " = ".join(reversed(piece.split(" = ")))


def in_one(pieces, answer) -> str:
    """7 * 12 + 30 = 114, where the next step goes on with the result before."""
    found, last = [], None
    for piece in pieces:
        left, result = piece.split(" = ")
        first, op, right = left.split()
        if first == last and op in "+-":
            found[-1] = f"{found[-1].split(' = ')[0]} {op} {right} = {result}"
        else:
            found.append(piece)
        last = result
    return "; ".join(found) + f" #### {answer}"


PRETTY, DOTS = str.maketrans("*/-", "×÷−"), str.maketrans("*-", "·–")
STYLES = {
    "our own": tagged,
    "line breaks": lambda p, n: lines("", p, n),
    "line breaks within the tags": lambda p, n: tagged(["\n".join(p)], n),
    "one line of text": lambda p, n: f"Let us see. {'. '.join(p)}. So {n} in all.",
    "words around": lambda p, n: "First, Mia does " + ", which is good. Then she does ".join(p) + f". Answer: {n}",
    "words between": lambda p, n: " so ".join(p) + f" then the final answer is {n}",
    "a dash between": lambda p, n: f"{' - and then '.join(p)} - the answer is {n}",
    "no blanks": lambda p, n: lines("", p, n).replace(" ", "").replace("is", " is "),
    "many blanks": lambda p, n: lines("", p, n).replace(" ", "   "),
    "× ÷ −": lambda p, n: lines("", p, n).translate(PRETTY),
    "· –": lambda p, n: lines("", p, n).translate(DOTS),
    "x": lambda p, n: lines("", p, n).replace("*", "x"),
    "3x12": lambda p, n: lines("", p, n).replace(" * ", "X"),
    "units": lambda p, n: numbers(lambda m: f"{m} apples", lines("", p, n)),
    "long units": lambda p, n: numbers(lambda m: f"{m} red apples in all", lines("", p, n)),
    "dollars": lambda p, n: numbers(lambda m: f"${m}", lines("", p, n)),
    "decimals": lambda p, n: numbers(lambda m: f"{m}.0", lines("", p, n)),
    "dollars and cents": lambda p, n: numbers(lambda m: f"${m}.00", lines("", p, n)),
    "thousands": lambda p, n: numbers(lambda m: f"{m:,}", lines("", p, n)),
    "leading zeros": lambda p, n: numbers(lambda m: f"0{m}", lines("", p, n)),
    "bold numbers": lambda p, n: numbers(lambda m: f"**{m}**", lines("", p, n)),
    "bold lines": lambda p, n: lines("**", p, f"**{n}**", "**"),
    "LaTeX, boxed": lambda p, n: f"${'$, so $'.join(p)}$. Thus $\\boxed{{{n}}}$".replace("*", r"\times"),
    "LaTeX, \\div": lambda p, n: lines("$", p, f"${n}$", "$").replace("/", r"\div"),
    "LaTeX, brackets": lambda p, n: lines(r"\[ ", p, n, r" \]").replace("*", r"\cdot"),
    "LaTeX, units": lambda p, n: numbers(lambda m: f"{m} \\text{{ apples}}", lines(r"\(", p, n, r"\)")),
    "last result boxed": lambda p, n: "\n".join([*p[:-1], p[-1].replace(f"= {n}", f"= \\boxed{{{n}}}")]),
    "numbered": lambda p, n: "".join(f"{i}. {piece}\n" for i, piece in enumerate(p, 1)) + f"#### {n}",
    "numbered, bracket": lambda p, n: "".join(f"{i}) {piece}.\n" for i, piece in enumerate(p, 1)) + f"**Answer:** {n}",
    "steps": lambda p, n: "".join(f"Step {i}: {piece}\n" for i, piece in enumerate(p, 1)) + f"<answer>{n}</answer>",
    "bullets -": lambda p, n: lines("- ", p, n),
    "bullets *": lambda p, n: lines(" * ", p, n),
    "bullets •": lambda p, n: lines("• ", p, n),
    "in brackets": lambda p, n: lines("(", p, n, ")"),
    "names": lambda p, n: lines("Apples in all = ", p, n),
    "names of sums": lambda p, n: lines("Apples left = apples - pears = ", p, n),
    "names with a number": lambda p, n: lines("So the cost of 3 pens = ", p, n),
    "turned round": lambda p, n: lines("", map(turned, p), n),
    "true chains": lambda p, n: lines("", [f"{piece} = {piece.split(' = ')[1]}" for piece in p], n),
    "true chains of sums": lambda p, n: lines("", [f"{piece} = {piece.split(' = ')[0]}" for piece in p], n),
    "one expression": in_one,
    "in words": lambda p, n: lines("", p, n).replace(" = ", " is "),
}  # fmt: skip


@pytest.mark.parametrize("name", STYLES)
def test_right_traces_pass_in_every_style(name):
    for problem in DRAWN:
        text = STYLES[name](list(problem.trace), problem.answer)
        found = grade(text, problem.question, problem.answer)
        assert (found.correct, found.trace) == (True, True), (text, problem.question)
        assert found.strict == (text == problems.solution(problem)), text


@pytest.mark.parametrize("lead, mark", WRAPS)
def test_the_styles_of_false_traces_are_no_reason_to_refuse(lead, mark):
    for problem, end in zip(DRAWN, ENDS * len(DRAWN), strict=False):
        text = lead + mark.join(problem.trace) + end.format(problem.answer)
        found = grade(text, problem.question, problem.answer)
        assert found.correct and found.trace, text


# What is true and right but not in the grammar, and whether it has the format all the same.
LOOSE = {
    "two blanks": ("<reasoning>12 +  30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "two blanks between": ("<reasoning>12 + 30 = 42;  42 - 5 = 37</reasoning><answer>37</answer>", True),
    "no blanks": ("<reasoning>12+30=42; 42-5=37</reasoning><answer>37</answer>", True),
    "no blank between": ("<reasoning>12 + 30 = 42;42 - 5 = 37</reasoning><answer>37</answer>", True),
    "blank at the end": ("<reasoning>12 + 30 = 42; 42 - 5 = 37 </reasoning><answer>37</answer>", True),
    "blank at the start": ("<reasoning> 12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "other blanks": ("<reasoning>12 + 30 = 42; 42 -\u00a05 = 37</reasoning><answer>37</answer>", True),
    "empty piece first": ("<reasoning>; 12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "empty piece between": ("<reasoning>12 + 30 = 42; ; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "semicolon at the end": ("<reasoning>12 + 30 = 42; 42 - 5 = 37;</reasoning><answer>37</answer>", True),
    "full stop": ("<reasoning>12 + 30 = 42; 42 - 5 = 37.</reasoning><answer>37</answer>", True),
    "leading zero": ("<reasoning>12 + 30 = 042; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "leading zero of an operand": ("<reasoning>012 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "line break": ("<reasoning>12 + 30 = 42\n42 - 5 = 37</reasoning><answer>37</answer>", True),
    "line breaks in the tags": ("<reasoning>\n12 + 30 = 42; 42 - 5 = 37\n</reasoning>\n<answer>37</answer>", True),
    "words": ("<reasoning>First 12 + 30 = 42 apples. Then 42-5=37.</reasoning><answer>37</answer>", True),
    "a word between": ("<reasoning>12 + 30 = 42; then; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "×": ("<reasoning>5 × 30 = 150; 12 + 30 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "true chain": ("<reasoning>12 + 30 = 42 = 42; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "one expression": ("<reasoning>12 + 30 - 5 = 37</reasoning><answer>37</answer>", True),
    "turned round": ("<reasoning>42 = 12 + 30; 37 = 42 - 5</reasoning><answer>37</answer>", True),
    "decimal": ("<reasoning>12 + 30 = 42.0; 42 - 5 = 37</reasoning><answer>37</answer>", True),
    "text before": ("Sure! " + GOLD, False),
    "unit after the answer": (GOLD.replace("37</", "37 apples</"), False),
    "no tags": ("12 + 30 = 42; 42 - 5 = 37", False),
}  # fmt: skip


# The reasoning of false traces that the grader once took for strict, and others in the tolerant reading.
WRONG = [
    "7 * 12 + 30 = 42; 42 - 5 = 37", "-12 + 30 = 42; 42 - 5 = 37", "12 + 30 = 42 = 99; 42 - 5 = 37",
    "99 = 12 + 30; 12 + 30 = 42; 42 - 5 = 37", "12 + 30 = 42.5; 12 + 30 = 42; 42 - 5 = 37",
    "5 - 12 = -7; 12 + 30 = 42; 42 - 5 = 37", "5 - 12 = -3; 12 + 30 = 42; 42 - 5 = 37",
    "12 + 30 = 42; no, 42 - 5 is 99; 42 - 5 = 37", "12 + 30 = 42 - 5 = 37", "12 + 30  = 43; 42 - 5 = 37",
    "12 + 30 = 42\n42 - 5 = 38", "12 + 30 = 42; 42 - 5 = 37; total = 99", "Total = 37", "37 = 37",
    "Mia + 30 = 42; 42 - 5 = 37", "(12 + 30) * 5 = 162; 12 + 30 = 42; 42 - 5 = 37",
    "12 apples + 30 apples in 5 boxes = 99; 12 + 30 = 42; 42 - 5 = 37", "12 + 30 = 42; 42 - 5 = 37 =",
    "12 + 30 = 42; 42 - five = 12; 42 - 5 = 37", "5 * so 12 + 30 = 42; 42 - 5 = 37",
]  # fmt: skip


@pytest.mark.parametrize("reasoning", WRONG)
def test_false_traces_by_hand(reasoning):
    assert grade(tagged([reasoning], 37), QUESTION, 37) == Grade(True, 37, True, False, False)
    assert not grade(f"{reasoning}\nThe answer is 37.", QUESTION, 37).trace


@pytest.mark.parametrize("name", LOOSE)
def test_what_is_right_but_loose_is_not_strict(name):
    text, has_format = LOOSE[name]
    assert grade(text, QUESTION, 37) == Grade(has_format, 37, True, True, False)


@pytest.mark.parametrize("text", [
    GOLD, f"  {GOLD}\n", GOLD.replace("><", ">\n<"), GOLD.replace("37</answer>", "\n37\n</answer>"),
    "<reasoning>30 + 12 = 42; 42 - 5 = 37</reasoning><answer>37</answer>",
    "<reasoning>12 - 5 = 7; 7 + 30 = 37</reasoning><answer>37</answer>",  # another sound way
])  # fmt: skip
def test_strict_accepts(text):
    assert grade(text, QUESTION, 37) == Grade(True, 37, True, True, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "37",
        "<answer>37</answer>",
        "<reasoning></reasoning><answer>37</answer>",  # no trace
        "<reasoning>I just know.</reasoning><answer>37</answer>",
        "<reasoning>12 + 30 = 42</reasoning><answer>37</answer>",  # the trace ends elsewhere
        "<reasoning>12 + 30 = 43; 43 - 6 = 37</reasoning><answer>37</answer>",  # false, made-up 6
        "<reasoning>12 + 30 = 41; 42 - 5 = 37</reasoning><answer>37</answer>",  # false equation
        "<reasoning>36 + 1 = 37</reasoning><answer>37</answer>",  # numbers from nowhere
        GOLD + "<answer>38</answer>",  # two answers
        GOLD + GOLD,
        GOLD.replace("37</answer>", "37 or 38</answer>"),
        GOLD.replace("</answer>", ""),  # unclosed
        GOLD.replace("<answer>", "<answer><answer>"),  # nested
        "<answer>37</answer><reasoning>12 + 30 = 42; 42 - 5 = 37</reasoning>",  # wrong order
        "<reasoning>12 + 30 = 42; <answer>37</answer> 42 - 5 = 37</reasoning><answer>37</answer>",
        "<reasoning>12 + 30 = 42; 42 - 5 = 37<answer>37</answer></reasoning>",  # tags in the trace
        "Sure! " + GOLD,
        GOLD + " apples",
        GOLD.upper(),
        GOLD.replace(">37<", ">037<"),
        GOLD.replace(">37<", ">37.0<"),
        GOLD.replace(">37<", ">+37<"),
        GOLD.replace(">37<", ">３７<"),  # full-width digits  # noqa: RUF001
        GOLD.replace(">37<", ">٣٧<"),
        GOLD.replace(">37<", ">thirty-seven<"),
        GOLD.replace("42 - 5", "4２ - 5"),  # noqa: RUF001
    ],
)
def test_strict_refuses(text):
    assert not strict(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 37.", 37),
        ("12 + 30 = 42, so 42 - 5 = 37 #### 37", 37),
        ("37", 37),
        ("It is 1,000 in all", 1000),
        ("That makes 1,234,567.", 1234567),
        ("7.0", 7),
        ("007", 7),
        ("-4", -4),
        ("The final answer is: **$37.00**, 5 less than 42", 37),
        ("**Answer:** 37 apples, which leaves 5", 37),
        ("the answer is \\(37\\), not 42", 37),
        ("The answer is 12 + 30 = 42", 42),
        ("The answer is 42 - 5, which is 37", 37),
        ("#### 37\nI took 5 from 42", 37),
        ("\\boxed{37} of 42", 37),
        ("\\boxed{\\text{37 apples}} of 42", 37),
        ("So 42 − 5 is \\boxed{−4}", -4),
        ("<answer>37</answer> #### 38", 37),  # the surest announcement counts
        ("#### 37. The answer is 38", 37),
        ("The answer is 37. The answer is 38.", None),  # hedging
        ("The answer is 37 or 38.", None),
        ("#### 37 or 38", None),
        ("\\boxed{37} \\boxed{38}", None),
        ("42 - 5 = 37. The answer is 37.5", None),
        ("42, or 4\uff12", None),
        ("42, or 42.5", None),
        ("<answer>37</answer> or was it 38?", 37),
        ("<answer> 37 apples </answer>", 37),
        ("<answer>37</answer><answer>37</answer>", 37),
        ("<answer>37</answer><answer>38</answer>", None),  # hedging
        ("<answer>37 or 38</answer>", None),
        ("<answer>none</answer> 37", None),
        ("7.5", None),
        ("1,00", None),
        ("no number", None),
        ("٣٧", None),
        ("", None),
    ],
)
def test_answer_in_any_style(text, answer):
    assert parse_answer(text) == answer


def test_canonical_answers_only_in_strict_format():
    question, trace = (
        "A box holds 9 nuts. He eats 2. How many are left?",
        "<reasoning>9 - 2 = 7</reasoning>",
    )
    assert grade(f"{trace}<answer>7</answer>", question, 7).strict
    for given in ("007", "7.0", "7,", "+7", "-0", "7 nuts"):
        found = grade(f"{trace}<answer>{given}</answer>", question, 7)
        assert not found.format and not found.strict


def test_units_are_known_numbers():
    question = "Leo has 4 dozen eggs and 5 loose eggs. How many eggs does he have in all?"
    assert grade(
        "<reasoning>4 * 12 = 48; 48 + 5 = 53</reasoning><answer>53</answer>", question, 53
    ).strict
    assert not grade(
        "<reasoning>4 * 7 = 28; 28 + 5 = 33</reasoning><answer>33</answer>", question, 33
    ).trace


@pytest.mark.parametrize(
    "text",
    [
        "9" * 1_000_000,
        "<reasoning>" * 100_000,
        "1 + 1 = " * 200_000,
        "1," * 500_000,
        "1,111" * 4_000,
        " " * 19_000 + "x",
        "<answer>" * 2_400,
        "-" * 19_999,
        "1 " * 9_999,
        "1a" * 9_999,
        "a " * 9_999,
        "a=" * 9_999,
        "= a " * 4_999,
        "1 x " * 4_999,
        "1 apples " * 2_200,
        "of 1 a " * 2_800,
        "; a of 1 a " * 1_800,
        "answer " * 2_800,
        "answer is 1 or 1 " * 1_100,
        "#### 1" * 3_300,
        "\\boxed{" * 2_800,
        "\\" * 19_999,
        "** " * 6_600,
        "\n- " * 6_600,
        "12 + 30 is 42 " * 1_400,
        "12 * " * 3_900 + "12 = 42",
        "12 + 30 = 42; " * 1_400 + "42 - 5 = 99",
        "<reasoning>" + "12 + 30 = 42; " * 1_400 + "</reasoning><answer>37</answer>",
        "<reasoning>" + " " * 19_900 + "</reasoning><answer>37</answer>",
        "<reasoning>1</reasoning>" + " " * 19_900 + "<answer>37</answer",
    ],
)
def test_hostile_text_is_graded_at_once(text):
    start = time.perf_counter()
    assert not strict(text)
    # 0.05 s is the slowest; what grows with the square of the length takes tens of seconds.
    assert time.perf_counter() - start < 1.0


def test_random_garbage_never_raises_and_never_passes():
    rng = random.Random(0)
    pieces = [
        *TAGS,
        "37",
        "42",
        "12 + 30 = 42",
        " ",
        ";",
        "\n",
        "<",
        ">",
        "é",
        "\x00",
        "-",
        ",",
        ".",
    ]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert not strict(text)


def test_a_completion_must_be_text():
    with pytest.raises(TypeError, match="a completion is a str, not list"):
        grade([{"role": "assistant", "content": GOLD}], QUESTION, 37)
