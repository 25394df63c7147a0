"""Rows of responses to one problem, and an annotator with known scores, for tests."""

from rlnb.data.annotators import Annotator

QUESTION, ANSWER = "Anna has 12 apples and buys 5 more. How many now?", 17
RIGHT = "<reasoning>12 + 5 = 17</reasoning><answer>17</answer>"
WRONG = "<reasoning>12 - 5 = 7</reasoning><answer>7</answer>"
LOOSE = "12 + 5 = 17"


def row(*responses, id="a"):
    return {"id": id, "question": QUESTION, "answer": ANSWER, "kind": "gain",
            "prompt": [{"role": "user", "content": QUESTION}], "responses": list(responses)}  # fmt: skip


class Fixed(Annotator):
    """Scores by a table."""

    name = "fixed"

    def __init__(self, **scores):
        self.table = scores

    def score(self, question, answer, response):
        return self.table[response]
