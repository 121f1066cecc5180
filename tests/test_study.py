"""Do the pages and the README say what came out of the study? (.github/study.py)"""

import json
import math
import re
import sys

import pytest

from make_assignment import ROOT

sys.path.append(str(ROOT / ".github"))

import study  # noqa: E402, after the path is set
from study import in_words  # noqa: E402

pytestmark = pytest.mark.course


def test_a_gain_by_hand(tmp_path):
    """The differences between runs of the same seed are 1, 2, 3: their mean and its interval."""
    runs = [("E8", 0, 5), ("E8", 1, 7), ("E8", 2, 9),
            ("dense", 2, 6), ("dense", 1, 5), ("dense", 0, 4), ("dense", 3, 100)]
    lines = [json.dumps(dict(run=run, seed=seed, top1=top1)) for run, seed, top1 in runs]
    (tmp_path / "results").write_text("\n".join(lines))
    gain = study.Study(tmp_path / "results").gain("E8")
    assert gain == (2, 1, 3)
    assert gain.half == pytest.approx(4.303 / math.sqrt(3)), "Student's t with 2 degrees of freedom"
    assert in_words(gain, "+") == "+2.0 (-0.5 to 4.5)"


def test_the_pages_are_those_of_the_results():
    """`python .github/study.py` would write the same files again."""
    found = study.Study()
    pages = {"study.md": study.write_tables, "study.svg": study.draw_study,
             "follows.svg": study.draw_follows}
    for name, write in pages.items():
        assert (ROOT / ".github" / name).read_text() == write(found), name
