"""Bad command lines: exit status 2, one line that says what is wrong, and no traceback."""

import pytest

from rlnb import __main__
from rlnb.record import runs

LINES = {
    "train dpo --set bta=1": "DPOConfig has no argument bta",
    "train dpo --set beta": "--set beta: give NAME=VALUE, like beta=0.5",
    "train dpo --set 2=3": "--set 2=3: give NAME=VALUE",
    "train sft --set max_steps=0": "max_steps is 0",
    "train sft --set learning_rate=-1": "learning_rate is -1",
    "train sft --set max_steps=many": "SFTConfig: max_steps='many' is no number",
    "train sft --rank 0": "LoRA rank is 0",
    "train sft --rank 65": "LoRA rank 65 is above max_lora_rank 64",
    "train sft --alpha 0": "LoRA alpha is 0",
    "train sft --alpha nan": "LoRA alpha is nan",
    "train sft --from sft": "sft starts from the base",
    "train dpo --from no/such/folder": "no adapter 'no/such/folder'",
    "train dpo --resume gone": "no run 'gone'",
    "doctor gone": "no run 'gone'",
    "run 99_gone": "no notebook 99_gone",
    "test units": "no stage units; there are lint",
    "compare --only PPO": "no method 'PPO'; there are 'base'",
    "compare --only SFT --seeds 0": "seeds is 0",
    "compare --only SFT --jobs 0": "jobs is 0",
    "compare --only SFT --seeds -1": "seeds is -1",
}
WRONG = {  # argparse's own
    "": "required: command", "trian": "invalid choice: 'trian'", "train": "required: method",
    "train dqn": "invalid choice: 'dqn'", "train sft --rank four": "invalid int value: 'four'",
    "train sft --seed 1.5": "invalid int value: '1.5'", "train sft --alpha big": "invalid float value: 'big'",
    "train sft --lora 3": "unrecognized arguments: --lora 3", "run --profile fast": "invalid choice: 'fast'",
    "compare --jobs two": "invalid int value: 'two'", "pretrain --maturity old": "invalid choice: 'old'",
    "setup --kind amd": "invalid choice: 'amd'", "doctor a b": "unrecognized arguments: b",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
@pytest.mark.filterwarnings("ignore")
def test_of_a_command(line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLNB_RUNS", str(tmp_path))
    status = __main__.main(line.split())
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith(("error", "Traceback"))]
    assert (status, len(told)) == (2, 1) and LINES[line] in told[0], told
    assert {run.status for run in runs.find()} <= {"failed"}


@pytest.mark.parametrize("line", WRONG)
def test_of_a_command_that_there_is_not(line, capsys):
    with pytest.raises(SystemExit) as ended:
        __main__.main(line.split())
    told = capsys.readouterr().err
    assert ended.value.code == 2 and WRONG[line] in told and "Traceback" not in told, told
