"""The rules on logs, and the report.

The logs are real: runs of the practice model from its SFT adapter, numbers rounded.
test_diagnose_trained.py trains tiny models that are broken on purpose.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlnb.record import diagnose, runs

# PPO from 277 right of 500, every second log: learning rate 1e-3, KL coefficient 0.05, to 366 right
PPO = {
    "reward": "-.15 -.2 -.41 -.087 .073 .34 .38 .24 .41 .39 .38 .51 .28 .51 .46 .74 .58 .57 .43 .71",
    "kl": "0 -.00045 .011 .03 .029 .051 .044 .055 .039 .061 .048 .042 .036 .051 .053 .05 .044 .045 "
        ".04 .036",
    "entropy": ".048 .061 .099 .1 .094 .12 .079 .095 .061 .067 .079 .067 .051 .069 .071 .068 .055 .056 "
        ".057 .048",
    "rewards/correctness/mean": ".56 .44 .33 .41 .45 .52 .52 .47 .55 .55 .55 .56 .52 .5 .55 .47 .59 .62 .55 .58",
}  # fmt: skip
# learning rate 3e-3 without a KL term, to 49 right of 500
PPO_TOO_HOT = {
    "reward": "-.15 -.63 -.23 -.019 -.31 .33 .34 .63 .34 .58 .6 .65 .63 .79 .52 .72 .72 .75 .51 .95",
    "kl": "0 0 .0022 .031 .056 .1 .23 .36 .34 .45 .4 .42 .56 .59 .67 .79 .86 .84 .89 .78",
    "entropy": ".048 .054 .069 .09 .13 .15 .2 .24 .18 .21 .16 .17 .21 .21 .3 .28 .28 .3 .32 .25",
    "rewards/correctness/mean": ".56 .36 .41 .36 .3 .31 .17 .2 .22 .14 .2 .062 .12 .094 .062 .031 .047 .078 .062 .047",
}  # fmt: skip
# KTO at 2e-4, to 155 right of 250
KTO = {
    "loss": ".5 .5 .5 .5 .5 .5 .5 .5 .5 .5 .5 .5 .49 .5 .49 .49 .49 .5 .49 .5 .49 .5 .5 .49",
    "kl": "0 0 .058 0 .087 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "rewards/chosen": "0 0 .00022 .0013 .0028 .0019 .0027 .0064 -.008 .0071 .0031 .0042 .0037 .0073 .0082 .0092 "
        ".0055 .00047 .0079 .0082 .0073 -.0024 -.0027 .0079",
    "rewards/rejected": "0 0 -.0038 .0014 -.0032 -.005 -.0063 -.01 -.013 -.0052 -.015 -.028 -.041 -.015 -.036 "
        "-.035 -.057 -.024 -.051 -.018 -.033 -.024 -.024 -.041",
    "rewards/margins": "0 0 .004 -5.4e-05 .0061 .0069 .009 .017 .0049 .012 .018 .032 .044 .023 .044 .045 .062 "
        ".025 .059 .026 .04 .021 .022 .049",
    "logps/chosen": "-.95 -.95 -.97 -1 -.79 -.81 -.76 -1 -1.1 -.68 -.77 -.95 -1 -1.2 -.94 -.68 -.56 -1.2 -.84 "
        "-.93 -1.4 -.92 -1.5 -.97",
}  # fmt: skip
# and at 5e-3, to 62 right of 250
KTO_TOO_HOT = {
    "loss": ".5 .5 .5 .49 .47 .43 .44 .47 .55 .44 .45 .42 .41 .43 .4 .42 .36 .38 .47 .39 .43 .38 .45 "
        ".45",
    "kl": "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "rewards/chosen": "0 0 .0051 .017 -.077 -.59 -1.1 -1.7 -1.7 -.69 -.86 -.52 -.41 -.24 -.21 -.26 -.23 -.56 "
        "-.49 -.4 -.28 -.28 -.49 -.43",
    "rewards/rejected": "0 0 -.03 -.06 -.37 -1.2 -1.5 -2.5 -2.3 -1.7 -1.4 -1.6 -1.2 -.94 -1.5 -1 -1.3 -1.4 -1.7 "
        "-1.3 -1.1 -1.5 -1.6 -1.5",
    "rewards/margins": "0 0 .035 .078 .3 .6 .48 .88 .6 1 .59 1.1 .8 .7 1.2 .79 1.1 .83 1.2 .86 .8 1.3 1.1 1",
    "logps/chosen": "-.95 -.95 -.93 -.86 -1.6 -6.8 -11 -18 -18 -7.6 -9.4 -6.1 -5.2 -3.7 -3.1 -3.4 -2.9 -6.8 "
        "-5.8 -5 -4.2 -3.7 -6.3 -5.4",
}  # fmt: skip
# GRPO at 2e-3, every fifth log, to 410 right of 500
GRPO = {
    "reward": ".95 .85 .82 1 .59 .63 .76 1 1.1 .69 .92 .95 .9 .82 1.1 .95 1.1 1 .92 .88 1.2 1.1",
    "entropy": ".046 .043 .058 .11 .089 .068 .074 .031 .027 .036 .046 .028 .037 .037 .023 .022 .023 .025 "
        ".027 .031 .016 .015",
    "completions/mean_length": "22 25 30 26 30 29 27 23 23 27 26 26 26 27 23 27 28 22 27 26 22 27",
}  # fmt: skip


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def registry(monkeypatch, tmp_path):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path / "runs"))


def rows(table, **times):
    """A table of numbers as a trainer's log; times: factors, one for each log, of some columns."""
    log = [dict(zip(table, map(float, row), strict=True))
           for row in zip(*(column.split() for column in table.values()), strict=True)]  # fmt: skip
    for name, factors in times.items():
        for row, factor in zip(log, factors, strict=True):
            row[name] *= factor
    return [{"loss": 0.0, "grad_norm": 1.0} | row for row in log]


def found(log):
    return {finding.name: finding.saw for finding in diagnose.run(log)}


@pytest.mark.parametrize("table", [PPO, KTO, GRPO], ids=["ppo", "kto", "grpo"])
def test_real_healthy_runs_are_silent(table):
    assert found(rows(table)) == {}


def test_ppo_that_leaves_its_reference_and_what_the_reward_model_cannot_see():
    saw = found(rows(PPO_TOO_HOT))
    assert set(saw) == {"kl runs away", "reward hacking", "more random"}
    assert saw["kl runs away"] == "kl 0 -> 0.83 nats per token"
    assert saw["reward hacking"].endswith("but correctness 0.44 at best, 0.05 now")
    assert "kl runs away" not in found(rows(PPO_TOO_HOT)[:8])  # it had not yet


def test_kto_whose_margin_grows_while_chosen_falls():
    saw = found(rows(KTO_TOO_HOT))
    assert "chosen falls" in saw and "margin 1" in saw["chosen falls"]
    assert "chosen falls" not in found(rows(KTO_TOO_HOT)[:5])


def test_samples_that_are_all_the_same_text():
    """None of the runs at hand came to this: it is one of them with its entropy brought down."""
    falling = [0.7**step for step in range(22)]
    report = diagnose.run(rows(GRPO, entropy=falling))
    assert [(f.name, f.level) for f in report] == [("entropy collapsed", "advice")]


def test_a_part_of_the_reward_that_was_never_earned_is_no_loss():
    assert found([row | {"rewards/correctness/mean": 0.0} for row in rows(PPO)]) == {}


def test_a_short_or_empty_log_says_nothing():
    assert diagnose.run([]) == []
    assert diagnose.run([{"loss": 1.0, "grad_norm": 1.0}, {"loss": 9.0, "grad_norm": 1.0}]) == []


@pytest.mark.parametrize("rows", [[{"loss": 0.0, "grad_norm": 1.0}], [{"loss": -1.0, "grad_norm": 1.0}]])
def test_losses_of_0_and_below_are_no_jump(rows):
    """A loss rounded to 0 in every log was said to have jumped to 1.5 times its first one."""
    assert found(rows * 12) == {}


def test_gradients_of_0_are_told():
    log = [{"loss": 0.0, "reward": 0.5, "grad_norm": 0.0} for _ in range(12)]
    assert found(log) == {"nothing moved": "grad_norm at most 0e+00 in 12 logs"}


def test_a_log_with_gaps_is_read():
    """Values that are missing or none: the rules take what there is."""
    log = [{"step": s, "loss": None, "reward": float(s), "rewards/a/mean": float("nan"), "rewards/margins": 1.0}
           for s in range(12)]  # fmt: skip
    assert found(log) == {}


def test_the_report_reads_well():
    first, means, do = str(diagnose.run([{"step": 3, "loss": float("nan")}])).splitlines()
    assert first == "PROBLEM not a number: loss at step 3"
    assert means.startswith("        From there on") and "learning rate" in do
    assert str(diagnose.run([])) == "nothing wrong"


def test_held_out_accuracy_is_compared_with_the_start_or_the_parent():
    with runs.start("sft") as parent:
        parent.finish(strict={"k": 60, "n": 100})
    with runs.start("dpo", parent=parent) as worse:
        worse.finish(strict={"k": 40, "n": 100})
    with runs.start("dpo", parent=parent) as same:  # within two standard errors
        same.finish(strict={"k": 55, "n": 100})
    with runs.start("grpo") as hacked:
        for step in range(12):
            hacked.log(step, loss=0.0, reward=step / 12)
        hacked.finish(strict={"k": 0, "n": 100}, start={"strict": {"k": 10, "n": 100}})
    assert diagnose.run(worse)[0].saw == "held out, strict: 60% -> 40% of 100"
    assert diagnose.run(same) == []
    assert "while the reward rose" in diagnose.run(hacked)[0].saw


def test_runs_that_did_not_end_by_themselves():
    with pytest.raises(KeyboardInterrupt), runs.start("sft", config={"max_steps": 9}) as stopped:
        stopped.log(4, loss=1.0)
        raise KeyboardInterrupt
    with pytest.raises(ValueError), runs.start("sft") as failed:
        raise ValueError("no such row")
    assert diagnose.run(stopped)[0].saw.startswith("interrupted, 4 of 9 steps logged, no adapter")
    assert "no such row" in diagnose.run(failed)[0].saw
    code = "import os; from rlnb.record import runs; run = runs.start('sft'); run.__enter__(); os._exit(1)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert diagnose.run(runs.find(status="lost")[0])[0].saw.startswith("lost")


def test_a_reference_that_is_not_where_the_policy_began():
    log = [{"step": s + 1} | row for s, row in enumerate(rows(KTO))]
    assert found(log) == {}
    log[0] |= {"rewards/chosen": -0.3, "kl": 0.0}
    assert found(log) == {"another reference": "rewards/chosen -0.3 at step 1, before anything was learnt"}
    assert "another reference" not in found(log[1:])  # somebody logs seldom


def test_a_model_that_stays_as_it_is_does_not_get_more_random():
    """Nothing but the prompts can have changed its entropy."""
    log = [{"loss": 0.0, "reward": 0.5, "entropy": 0.1 * (step + 1)} for step in range(12)]
    assert "more random" in found([row | {"grad_norm": 1.0} for row in log]) and "more random" in found(log)
    assert set(found([row | {"grad_norm": 0.0} for row in log])) == {"nothing moved"}
