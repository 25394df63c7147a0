"""rlnb.preferences: annotators against closed forms and their rates, shapes against TRL's own."""

import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from rlnb import preferences, problems
from rlnb.preferences import AI, Annotator, Clarity, Gold, LengthBiased, Noisy
from tests import tiny

QUESTION, ANSWER = "Anna has 12 apples and buys 5 more. How many now?", 17
RIGHT = "<reasoning>12 + 5 = 17</reasoning><answer>17</answer>"
WRONG = "<reasoning>12 - 5 = 7</reasoning><answer>7</answer>"
LOOSE = "12 + 5 = 17"


def row(*responses, id="a"):
    return {"id": id, "question": QUESTION, "answer": ANSWER, "kind": "gain",
            "prompt": [{"role": "user", "content": QUESTION}], "responses": list(responses)}  # fmt: skip


def judged(*responses, annotator=None, id="a"):
    return preferences.annotate([row(*responses, id=id)], annotator or Gold())


def says(messages):
    (message,) = messages
    assert message["role"] == "assistant"
    return message["content"]


class Fixed(Annotator):
    """Scores by a table, for tests."""

    name = "fixed"

    def __init__(self, **scores):
        self.table = scores

    def score(self, question, answer, response):
        return self.table[response]


# --- responses -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tiny.make(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder), tiny.tokenizer()


def test_responses_of_a_model(model, tmp_path):
    some = problems.generate("train", 3, seed=1)
    rows = preferences.collect(*model, some, n=2, seed=4, max_new_tokens=5)
    assert [r["id"] for r in rows] == [p.id for p in some]
    assert [r["answer"] for r in rows] == [p.answer for p in some]
    assert rows[0]["prompt"] == problems.prompt(some[0])
    assert all(len(r["responses"]) == 2 for r in rows)
    assert rows == preferences.collect(*model, some, n=2, seed=4, max_new_tokens=5)
    assert rows != preferences.collect(*model, some, n=2, seed=5, max_new_tokens=5)
    ranked = preferences.annotate(rows, Noisy(0.5))
    for data in (rows, ranked):
        preferences.write(data, tmp_path / "new" / "rows.jsonl")
        assert preferences.read(tmp_path / "new" / "rows.jsonl") == data


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    preferences.write([row(RIGHT, WRONG)], path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        preferences.write([row(RIGHT), row({1, 2})], path)
    assert preferences.read(path) == [row(RIGHT, WRONG)]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": 3}, "line 2, id: 3 is no str"),
        ({"answer": "17"}, "line 2, answer: '17' is no int"),
        ({"answer": True}, "line 2, answer: True is no int"),
        ({"responses": []}, "line 2, responses: [] are no texts"),
        ({"responses": [RIGHT, None]}, "line 2, responses: ["),
        ({"responses": RIGHT}, "line 2, responses: '<reasoning>"),
        ({"prompt": []}, "line 2, prompt: [] is not a list of messages"),
        ({"prompt": QUESTION}, "line 2, prompt: 'Anna has"),
    ],
)
def test_a_bad_row_of_a_file_is_named(change, says, tmp_path):
    preferences.write([row(RIGHT), row(RIGHT) | change], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"^rows\.jsonl, " + re.escape(says)):
        preferences.read(tmp_path / "rows.jsonl")


def test_the_import_is_light():
    code = (
        "import sys, rlnb.preferences, rlnb.quality, rlnb.labelling, rlnb.widgets\n"
        "heavy = 'datasets', 'torch', 'trl', 'transformers', 'numpy', 'ipywidgets', 'pyarrow'\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- annotators ----------------------------------------------------------------------------------


def test_the_verifier_ranks_by_what_is_strictly_right():
    (found,) = judged(WRONG, RIGHT, LOOSE, RIGHT)
    assert found["scores"] == [0, 1, 0, 1]
    assert found["ranks"] == [2, 1, 2, 1]
    assert found["comparisons"] == [
        [0, 1, -1], [0, 2, 0], [0, 3, -1], [1, 2, 1], [1, 3, 0], [2, 3, -1],
    ]  # fmt: skip
    assert found["annotator"] == "gold" and found["responses"] == [WRONG, RIGHT, LOOSE, RIGHT]


def test_ranks_follow_the_scores_whatever_they_are():
    scores = [0.5, -3.0, 2.0, 0.5, 7.0]
    (found,) = judged(*"abcde", annotator=Fixed(**dict(zip("abcde", scores, strict=True))))
    assert found["ranks"] == [3, 4, 2, 3, 1]


def test_ranks_by_comparisons_won():
    assert preferences.ranks(3, [(0, 1, 1), (1, 2, 1), (0, 2, -1)]) == [1, 1, 1]  # a circle
    assert preferences.ranks(3, [(0, 1, -1), (1, 2, 1)]) == [2, 1, 2]  # the best of three
    assert preferences.ranks(2, [(0, 1, 0)]) == [1, 1]
    assert preferences.ranks(2, []) == [1, 1]
    given = [2, 1, 3, 2]  # a ranked list from elsewhere comes through
    assert preferences.ranks(4, preferences.compared([-rank for rank in given])) == given


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 1.0])
def test_the_noisy_one_flips_at_its_rate_and_keeps_ties(rate):
    rows = [row(RIGHT, WRONG, LOOSE, id=str(i)) for i in range(1000)]
    flips = Counter()
    for found in preferences.annotate(rows, Noisy(rate), seed=3):
        verdicts = {(i, j): c for i, j, c in found["comparisons"]}
        assert verdicts[1, 2] == 0
        flips.update([verdicts[0, 1] == -1, verdicts[0, 2] == -1])
        assert found["scores"] is None
    spread = (2000 * rate * (1 - rate)) ** 0.5
    assert abs(flips[True] - 2000 * rate) <= 4 * spread


def test_verdicts_depend_on_the_seed_and_the_row_only():
    rows = [row(RIGHT, WRONG, id=str(i)) for i in range(64)]
    noisy = Noisy(0.5)
    found = preferences.annotate(rows, noisy, seed=1)
    assert preferences.annotate(rows[::-1], noisy, seed=1) == found[::-1]
    assert preferences.annotate(rows, noisy, seed=2) != found
    assert preferences.annotate(rows, Noisy(0.5, name="other"), seed=1) != found


def test_length_outweighs_being_wrong_at_the_weight_that_it_says():
    long = WRONG.replace("12 - 5 = 7", "12 - 5 = 7; 7 - 0 = 7")
    gap = (len(long) - len(RIGHT)) / 10  # in tens of characters
    for weight, better in ((0.9 / gap, 0), (1.1 / gap, 1)):
        (found,) = judged(RIGHT, long, annotator=LengthBiased(weight))
        assert found["ranks"][better] == 1 and found["ranks"][1 - better] == 2
    (found,) = judged("a" * 10, "a" * 30, annotator=LengthBiased(0.5))
    assert found["scores"] == [0.5, 1.5]


def test_clarity_by_its_rubric():
    judge = Clarity(correctness=2, clarity=1, format=1, detail=0.25)
    found = judge.dimensions(QUESTION, ANSWER, RIGHT)
    clarity = 0.25 / 3 + 0.75 * (1 - len(RIGHT) / 200)
    assert found == pytest.approx({"correctness": 1, "clarity": clarity, "format": 1})
    assert judge.score(QUESTION, ANSWER, RIGHT) == pytest.approx((2 + clarity + 1) / 4)
    twice = LOOSE + "; " + LOOSE
    found = judge.dimensions(QUESTION, ANSWER, twice + "<answer>")
    clarity = (0.25 * 2 / 3 + 0.75 * (1 - len(twice + "<answer>") / 200)) / 2
    assert found["clarity"] == pytest.approx(clarity) and found["format"] == 1 / 8
    found = judge.dimensions(QUESTION, ANSWER, "x" * 300)
    assert found == {"correctness": 0, "clarity": 0, "format": 0}
    assert judge.dimensions(QUESTION, ANSWER, "It is 17.")["correctness"] == 0.5


def test_one_dimension_alone_and_tastes_that_differ():
    short, long = LOOSE, RIGHT + " I added 12 and 5, so 12 + 5 = 17 and 17 - 5 = 12."
    brief, thorough = (Clarity(0, 1, 0, detail=detail) for detail in (0, 1))
    assert judged(short, long, annotator=brief)[0]["ranks"] == [1, 2]
    assert judged(short, long, annotator=thorough)[0]["ranks"] == [2, 1]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Noisy(1.1), "rate is 1.1: it must be between 0 and 1"),
        (lambda: Noisy(float("nan")), "rate is nan"),
        (lambda: Clarity(0, 0, 0), r"the weights are \(0, 0, 0\)"),
        (lambda: Clarity(-1), "none below 0"),
        (lambda: Clarity(detail=2), "detail is 2"),
        (lambda: judged(RIGHT, annotator=LengthBiased(of=Noisy())), "Noisy .* has no scores"),
        (lambda: judged("a", annotator=Fixed(a=float("nan"))), r"row a: fixed scores \[nan\]"),
    ],
)
def test_an_annotator_that_cannot_work(make, says):
    with pytest.raises((ValueError, NotImplementedError), match=says):
        make()


def test_a_causal_model_scores_by_mean_log_probability(model):
    import torch

    network, tokens = model
    texts = [RIGHT, LOOSE, RIGHT, ""]
    found = AI(network, tokens).scores(row(*texts))
    for text, score in zip(texts, found, strict=True):
        head = tokens(f"<|user|>{QUESTION}<|assistant|>")["input_ids"]
        ids = tokens(f"<|user|>{QUESTION}<|assistant|>{text}<|end|>")["input_ids"]
        with torch.no_grad():
            logps = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        own = [logps[t - 1, ids[t]].item() for t in range(len(head), len(ids))]
        assert score == pytest.approx(sum(own) / len(own), abs=1e-4)
    assert found[0] == found[2]
    assert AI(network, tokens).score(QUESTION, 0, RIGHT) == pytest.approx(found[0], abs=1e-4)


def test_a_reward_model_scores_by_its_head(model, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    network, tokens = model
    network.save_pretrained(tmp_path)
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    found = preferences.annotate([row(RIGHT, LOOSE, WRONG)], AI(judge, tokens, name="rm"))[0]
    for text, score in zip(found["responses"], found["scores"], strict=True):
        ids = tokens(f"<|user|>{QUESTION}<|assistant|>{text}<|end|>", return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(judge(**ids).logits.item(), abs=1e-4)
    assert found["ranks"].index(1) == found["scores"].index(max(found["scores"]))
    two = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    with pytest.raises(ValueError, match="a reward model has 1 output, and this one 2"):
        preferences.annotate([row(RIGHT, LOOSE)], AI(two, tokens))


# --- TRL's shapes --------------------------------------------------------------------------------


def test_all_pairs_and_what_is_left_out():
    data, left_out = preferences.pairs(judged(RIGHT, WRONG, WRONG, LOOSE, " "))
    assert [(says(r["chosen"]), says(r["rejected"])) for r in data] == [
        (RIGHT, WRONG), (RIGHT, LOOSE),
    ]  # fmt: skip
    assert left_out == {"ties": 6, "duplicates": 1, "empty": 1}
    assert data[0]["prompt"] == row()["prompt"] and data["id"][:] == ["a", "a"]


def test_one_pair_of_each_prompt():
    ranked = []
    for i in range(40):
        ranked += judged("c", "a", "b", "a", annotator=Fixed(a=1, b=2, c=3), id=str(i))
    ranked += judged("a", "a", annotator=Fixed(a=1), id="tied")
    best, left_out = preferences.pairs(ranked, how="best-worst")
    assert {(says(r["chosen"]), says(r["rejected"])) for r in best} == {("c", "a")}
    assert len(best) == 40 and left_out == {"ties": 1, "duplicates": 0, "empty": 0}
    some, left_out = preferences.pairs(ranked, how="random", seed=2)
    assert some["id"][:] == best["id"][:] and left_out["ties"] == 1
    seen = {(says(r["chosen"]), says(r["rejected"])) for r in some}
    assert seen == {("c", "a"), ("c", "b"), ("b", "a")}
    assert preferences.pairs(ranked, how="random", seed=2)[0][:] == some[:]
    assert preferences.pairs(ranked, how="random", seed=3)[0][:] != some[:]


def test_no_pair_left_and_a_wrong_choice():
    with pytest.raises(ValueError, match=r"no pair is left; left out are \{'ties': 1, "):
        preferences.pairs(judged(RIGHT, RIGHT))
    with pytest.raises(ValueError, match="how is 'best': it can be 'all', 'random' or"):
        preferences.pairs(judged(RIGHT, WRONG), how="best")


def test_labels_from_the_ends_of_a_ranking():
    ranked = judged(*"abcda", annotator=Fixed(a=1, b=2, c=3, d=3))
    ranked += judged("a", "a", annotator=Fixed(a=1), id="tied")
    data, left_out = preferences.unpaired(ranked)
    found = {says(r["completion"]): r["label"] for r in data}
    assert found == {"a": False, "c": True, "d": True} and len(data) == 3
    assert left_out == {"ties": 1, "middle": 1, "duplicates": 1, "empty": 0}


def test_labels_from_a_threshold():
    ranked = judged(*"abc", "", annotator=Fixed(**{"a": 1, "b": 2, "c": 3, "": 0}))
    data, left_out = preferences.unpaired(ranked, threshold=2)
    assert {says(r["completion"]): r["label"] for r in data} == {"a": False, "b": True, "c": True}
    assert left_out["empty"] == 1 and left_out["ties"] == 0
    with pytest.raises(ValueError, match="row a: noisy gives no scores for a threshold"):
        preferences.unpaired(judged(RIGHT, WRONG, annotator=Noisy()), threshold=0.5)
    with pytest.raises(ValueError, match="label is True in all 2 rows"):
        preferences.unpaired(judged(RIGHT, WRONG), threshold=0)


def test_the_labels_come_mixed():
    ranked = []
    for i in range(100):
        ranked += judged(RIGHT, WRONG, id=str(i))
    pairs, _ = preferences.pairs(ranked)
    for data in (preferences.unpaired(ranked, seed=1)[0], preferences.unpair(pairs, seed=1)):
        labels = data["label"][:]
        assert sum(labels) == 100 and len(labels) == 200
        batches = [labels[i : i + 8] for i in range(0, 200, 8)]
        assert all(0 < sum(batch) < 8 for batch in batches[:10])


def test_unpair_gives_the_rows_of_trl():
    from trl.data_utils import unpair_preference_dataset

    pairs, _ = preferences.pairs(judged(RIGHT, WRONG, LOOSE, annotator=Clarity()))
    theirs, ours = unpair_preference_dataset(pairs), preferences.unpair(pairs, seed=1)
    assert sorted(theirs.column_names) == sorted(ours.column_names)

    def rows(data):
        return sorted(json.dumps(r, sort_keys=True) for r in data)

    assert rows(ours) == rows(theirs)
    assert theirs["label"][:] != ours["label"][:]


def test_noise_turns_round_the_share_that_was_asked_for():
    ranked = []
    for i in range(50):
        ranked += judged(RIGHT, WRONG, id=str(i))
    pairs, _ = preferences.pairs(ranked)
    before = set()
    for rate in (0.0, 0.1, 0.25, 1.0):
        noisy = preferences.noise(pairs, rate, seed=5)
        wrong = {r["id"] for r in noisy if says(r["chosen"]) == WRONG}
        assert len(wrong) == round(50 * rate) and before <= wrong
        assert wrong == {r["id"] for r in noisy if r["flipped"]}
        assert all({says(r["chosen"]), says(r["rejected"])} == {RIGHT, WRONG} for r in noisy)
        before = wrong
    assert preferences.noise(pairs, 0.1, seed=6)["flipped"][:] != noisy["flipped"][:]
    labels = preferences.unpair(pairs)
    noisy = preferences.noise(labels, 0.1)
    changed = [a["label"] != b["label"] for a, b in zip(labels, noisy, strict=True)]
    assert sum(changed) == 10 and changed == noisy["flipped"][:]
    with pytest.raises(ValueError, match=r"rate is -0\.1"):
        preferences.noise(pairs, -0.1)


def test_a_verdict_can_be_read_back_from_its_file(tmp_path):
    ranked = judged(RIGHT, WRONG, LOOSE, annotator=Noisy(0.5))
    preferences.write(ranked, tmp_path / "x.jsonl")
    again = preferences.read(tmp_path / "x.jsonl")
    assert preferences.pairs(again)[0].to_list() == preferences.pairs(ranked)[0].to_list()


def test_an_annotator_of_ones_own_needs_a_score_only():
    assert Fixed(a=1, b=2).judge(row("a", "b"), random.Random(0)) == ([(0, 1, -1)], [1, 2])
