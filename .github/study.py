"""Collect, draw and tabulate the study on glyphs (study.sh).

    python .github/study.py --add study/E8-0     append a finished run to study.jsonl
    python .github/study.py                      draw study.svg, write study.md
"""

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "study.jsonl"


def add(folder):
    """Append what a finished run reached to study.jsonl: its last epoch, not its best."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    from eval import read_checkpoint
    checkpoint = read_checkpoint(str(folder / "last.pt"), "cpu")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    args, last = checkpoint["args"], log[-1]
    if checkpoint["epoch"] != args["epochs"]:
        raise ValueError(f"{folder} is not finished")
    name, _, seed = folder.name.rpartition("-")
    found = dict(run=name, seed=int(seed), top1=last["top1"], val_loss=last["val_loss"])
    found["train_loss"] = last["train_loss"]
    found["unevenness"] = [statistics.pstdev(load) * len(load) for load in last["load"]]
    found["seconds"] = round(sum(line["seconds"] for line in log))
    names = ("data", "model", "moe_layers", "experts", "k", "expert_ratio", "router", "lr",
             "balance_weight", "epochs")
    found |= {name: args[name] for name in names} | dict(torch=torch.__version__)
    with open(RESULTS, "a") as file:
        print(json.dumps(found), file=file)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--add"]:
        add(Path(sys.argv[2]))
