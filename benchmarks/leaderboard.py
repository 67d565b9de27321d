"""docs/leaderboard.md: every defence under every threat, its interval and its costs, from runs of notebook 6.

make demo RECIPE=leaderboard
.venv/bin/python -m benchmarks.leaderboard > docs/leaderboard.md
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd

from atoplib.evaluation import markdown_table
from atoplib.figures.style import plain
from benchmarks.report import number

ABOUT = """# Leaderboard

Every MNIST and CIFAR-10 defence that comes with the kit under every threat of the protocol `compare`
([protocols.md](protocols.md)): % of the images, single samples, with the 95 % interval (Wilson). Each
defence is attacked through everything that it has; every number is an upper bound, of one training seed.
The order of the columns is that of the mean. *Worst case*: correct on the clean image and
under all attacks, transfer included; *worst unseen*: under those that are not the ℓ∞ PGD of the training.

Made by `make demo RECIPE=leaderboard && .venv/bin/python -m benchmarks.leaderboard > docs/leaderboard.md`;
CIFAR-10 was read from a folder of its image files here, so its 128 images are others than a download's:
AToP's column is that of `evaluate` by revision da7b041, the other three by a6d9ff7, all ℓ2 by ddf7c37,
AToP's flow by 921ff94. MNIST's ℓ2 row is that of `evaluate` on the same images by ddf7c37, its flow by
921ff94, the others by f49a38f. CIFAR-10's AToP contains AT: its purifier reads the features of that network,
and its pre-training AT's. AT of as many FLOPs as AToP is not in the table: it was attacked in ℓ∞ alone and
keeps 39.8 % [31.8, 48.5] ([results.md](results.md#cifar-10)).
Times are of one thread of an AMD EPYC (AVX-512), MNIST's beside much else, CIFAR-10's beside one other.
**A line of your own** is one command, for any network that maps images in [0, 1] to logits:

    make demo RECIPE=leaderboard \\
        ARGS="--only mnist -p others '{mine: {classifier: weights.pth}}' \\
              -p classifier package.module:function"

`-p mean`, `-p std` and `-p classifier_options` belong to it; with a purifier of notebook 2 or 3 it is
`-p others '{mine: {purifier: RUN, classifier: RUN}}'`.
"""


def accuracies(frame: pd.DataFrame) -> pd.DataFrame:
    """A line an attack, a column a defence, cells ``accuracy [low, high]``, the best of a line bold; the best
    mean comes first."""
    frame = frame[frame["rule"] == "single"]
    frame = frame.assign(attack=frame["attack"].map(plain))
    lines, grouped = frame["attack"].unique(), frame.groupby("attack")["accuracy"]
    best = grouped.transform("max").where(grouped.transform("nunique") > 1)
    ends = frame[["accuracy", "low", "high"]].map("{:.1f}".format)
    bold = (frame["accuracy"] == best).map({True: "**", False: ""})
    frame["cell"] = bold + ends["accuracy"] + bold + " [" + ends["low"] + ", " + ends["high"] + "]"
    white_box = frame[frame["threat_model"] == "white-box"]
    mean = white_box.groupby("defence")["accuracy"].mean().sort_values(ascending=False, kind="stable")
    table = frame.pivot(index="attack", columns="defence", values="cell").loc[lines, mean.index]
    table.loc["mean of white-box attacks"] = mean.map("{:.1f}".format)
    return table.rename_axis("%")


def costs(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A line a defence: TFLOP of its training, MFLOP and milliseconds of a decision."""
    table = pd.DataFrame(rows).set_index("defence").drop(columns="votes")
    return table.map(lambda value: "–" if pd.isna(value) else number(value))


def dataset_of(run: Path) -> str:
    """What a run of notebook 6 was measured on."""
    return json.loads((run / "parameters.json").read_text(encoding="utf-8"))["dataset"]


def name_of(run: Path) -> str:
    """Its name; of a folder the last part, without where it lies."""
    return dataset_of(run).rpartition("/")[2]


def section(run: Path) -> str:
    """One run of notebook 6 as a section of the page."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    frame, name, dataset = pd.read_csv(run / "frame.csv"), name_of(run), dataset_of(run)
    parts = [
        f"## {name}",
        results["caption"].replace(dataset, name) + ".",
        markdown_table(accuracies(frame)),
        markdown_table(costs(results["costs"])),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"), help="the experiment's folder")
    folder = parser.parse_args().runs
    runs = sorted(path.parent for path in folder.glob("06_compare*/results.json"))
    if not runs:
        parser.error(f"{folder} holds no finished run of notebook 6; make demo RECIPE=leaderboard makes them")
    contents = "\n".join(f"- [{name_of(run)}](#{name_of(run)})" for run in runs)
    print("\n\n".join([ABOUT.strip(), contents, *map(section, runs)]))


if __name__ == "__main__":
    main()
