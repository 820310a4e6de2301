"""What must hold after the notebook has run; its names are the notebook's."""

assert losses["saturated"] - losses["soft"] > 3
assert losses["uniform"] > losses["saturated"] - 1
assert losses["nearest saturated"] - losses["soft"] < 1.5

above = depth - losses["soft"]
assert above["up to here"].is_monotonic_increasing
assert above["from here up"].is_monotonic_decreasing
assert above.loc[22, "from here up"] > 0.1

copied = loss(repeated, start)
assert copied < 4
assert copying.loc["induction heads", "saturated"] < copied + 0.3
assert copying.loc["induction heads", "uniform"] > copied + 4
assert (frame.loc[induction, ["target", "second_target"]] == "induction").any(axis=1).sum() >= 4

assert soft_norms[15, :, 0].mean() > 20 * soft_norms[15, :, 1:].median()
assert uniform_norms[15, :, 1:].median() > 3 * soft_norms[15, :, 1:].median()
assert (table["target"] == "first").sum() > 60
assert (table["role_no_sink"] == "argmax").sum() < (table["role"] == "argmax").sum()
assert (table["role_no_sink"] == "mean-lean").sum() > (table["role"] == "mean-lean").sum()

for name, transform in marked.items():
    assert table[name].sum() >= 10
    assert loss_with(transform, held_out, list(table.index[table[name]])) - losses["soft"] < 0.25
