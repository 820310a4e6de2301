"""What must hold after the notebook has run; its names are the notebook's."""

import math
from pathlib import Path

levels = {row["model"]: row["level"] for row in rows}
assert levels == {"demo": "scores", "bert": "softmax", "t5": "softmax"}
assert [row["heads"].split(".")[0] for row in rows if row["model"] == "t5"] == (
    ["encoder"] * 2 + ["decoder", "cross"] * 2
)

assert returned[:2] == (0, 1)
assert in_place[:2] == (0, 0)
assert not in_place[2][HOOK].any()
assert never_fired[:2] == (0, 0)
assert not calls
assert change > 0.1
assert "fused kernel" in refusal

assert on_padding == 0
assert apart < 1e-3
assert int(frame["n_rows"].iloc[0]) == sum(lengths)
assert correlations["all queries"] < 0 < correlations["last layer"]
assert correlations["all queries"] < correlations["query 3"] < 0.3

assert "several stacks" in no_prefix
assert kept.loc["encoder"].tolist() == [False, True, False]
assert kept.loc["decoder"].tolist() == [True, False, False]
assert kept.loc["cross"].tolist() == [True, True, False]
crossing = t5_frame[t5_frame["stack"] == "cross"]
assert crossing[["previous", "modal_offset"]].isna().all(axis=None)
assert t5_frame.drop(crossing.index)[["previous", "modal_offset"]].notna().all(axis=None)
assert set(t5_sweep.values) == {"encoder", "decoder", "cross"}

assert vit_roles.loc["L0H0", ["role", "target"]].tolist() == ["argmax", "previous"]
assert vit_roles.loc["L0H1", ["role", "target"]].tolist() == ["argmax", "offset -4"]
assert maps["L0H0"][3, 2] > 0.99
assert maps["L0H1"][2, 3] > 0.99
assert max(float(maps[label].max()) for label in ("L1H0", "L1H1")) < 0.5

assert gap < 1e-4
by_stack = {site.stack: bool(site.why_not) for site in sl.attention_sites(plain_t5)}
assert by_stack == {"encoder": True, "decoder": True, "cross": False}

# The solutions of the exercises, as they stand in the text.
text = Path("07_beyond_gpt2.py").read_text().partition("# ```python\n")[2].partition("# ```\n")[0]
exec("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()))
assert sl.head_roles(vit, images, progress=False).frame().loc["L0H0", "target"] == "offset +5"
assert order_matters == {0: False, math.inf: True}
assert torch.allclose(by_bridge, by_plain, atol=1e-3)
