"""Sweeps over heads: what changes in the output when one head's attention is replaced.

``source="local"`` asks what a head's softness is for: its own pattern is saturated, computed from
the very run it sits in, and everything downstream sees the difference. ``source="run"`` is
activation patching between the soft and the saturated run, number for number that of
``transformer_lens.patching``: a head then also brings what its predecessors did to its input.

Signs follow TransformerLens (``transformer_lens.patching``, ``tools.analysis``): the patched run
minus the run that is patched. Its ``attribution_patch`` estimates the effect of patching from
corrupt towards clean; ``method="attribution"`` is the same estimate, from one attention to another
in place of one prompt to another. What a sweep finds can be followed up there as it is, inside
``with sat_lens.saturate(model, ...)``: ``patching.get_act_patch_direct_path`` says through which
later head an effect goes, ``interchange`` in which subspace.

When not to use it: to change many heads at once and look at the activations, for which there is
:func:`sat_lens.run_with_saturation_cache`, or on a corpus: a sweep holds one batch of prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sat_lens._checks import check_choice, check_count, is_integer
from sat_lens.attention import Limit, RandomKey, Transform
from sat_lens.caching.activations import COMPONENTS, Component
from sat_lens.data import Batch, Data, read_batch
from sat_lens.errors import ArgumentError
from sat_lens.metrics import Metric
from sat_lens.patching.arguments import (
    HeadGroups,
    PatchedPositions,
    check_combination,
    check_positions,
    check_same_shape,
    entries_of,
    name_of,
    provenance_of,
)
from sat_lens.patching.engine import Evaluated, Work
from sat_lens.patching.estimates import Method, values_of
from sat_lens.patching.readout import check_depends
from sat_lens.patching.result import HeadSweep
from sat_lens.patching.runs import (
    Baseline,
    Experiment,
    FromRun,
    Local,
    Patch,
    activations_of,
    make_baseline,
    sequence_lengths,
)
from sat_lens.sites import Heads

Direction = Literal["noising", "denoising"]
Source = Literal["local", "run"]


def sweep_heads(
    model: Any,
    inputs: Data | Mapping[str, Any],
    metric: Metric,
    corrupted: Data | Mapping[str, Any] | None = None,
    heads: Heads | HeadGroups = None,
    direction: Direction = "noising",
    source: Source = "local",
    component: Component = "z",
    positions: PatchedPositions = None,
    transform: Transform | None = None,
    method: Method = "exact",
    reduce: Literal["mean"] | None = "mean",
    *,
    baseline: Literal["random"] | None = None,
    controls: int = 5,
    confirm: float = 0.2,
    fast: bool = True,
    seed: int = 0,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
) -> HeadSweep:
    """Patch one head after the other between the soft and the saturated run; measure the output.

    Args:
        model: A TransformerLens model in evaluation mode.
        inputs: One prompt, a list of prompts, tokens ``[batch, position]``, or a dict of the
            model's own arguments (``input``, ``attention_mask``, ...).
        metric: A function of the logits that gives a scalar. One that names the positions it reads
            in ``.positions``, as those of :mod:`sat_lens.metrics` do, is served faster. With
            ``.positions = "last"`` it is given the logits of each prompt's last token alone,
            ``[batch, 1, vocab]``. One that reads padding is refused.
        corrupted: Other prompts of the same shape. For comparison each head's z is then also taken
            from their soft run into that of ``inputs`` (noising), or the other way (denoising).
        heads: Which heads; None is all. A list of lists, or a mapping from names to choices of
            heads, patches each group at once.
        direction: ``"noising"`` puts saturated attention into a soft run, ``"denoising"`` soft
            attention into a run in which every head of the model is saturated.
        source: ``"local"`` computes the head's new pattern in the run it is patched into, ``"run"``
            takes a component of the head from the other run.
        component: With ``source="run"``, what is taken: ``"z"``, ``"pattern"``, ``"q"``, ``"k"`` or
            ``"v"``. Heads that share keys and values have their k and v patched together.
        positions: None patches all query positions at once, ``"each"`` or a list of positions each
            of them by itself (for k and v these are key positions).
        transform: What stands for saturation; None is the limit of an infinite inverse temperature.
        method: ``"exact"``; ``"attribution"``, a first-order estimate of all heads from two
            forwards and one backward, which ranks and does not measure: saturation is no small
            step; or ``"screen"``, which computes exactly the heads that the estimate ranks highest.
        reduce: ``"mean"`` for one value per head, None to keep one per prompt.
        baseline: ``"random"`` measures beside each effect that of random keys in the same place,
            which tells an effect from mere disturbance.
        controls: How many draws of random keys that takes; their mean and spread are given. Each
            costs as much as the sweep itself.
        confirm: For a screen, the share of the heads that is computed exactly.
        fast: Whether to run only what comes after a head, where that is proven to give the same.
        seed: Seed of the values that are drawn to be checked, and of the first draw of random keys;
            further draws count up from it.
        attention_mask, tokenizer: Which tokens are padding (of ``corrupted`` too), and what reads
            texts; see :func:`sat_lens.data.batches`.
        progress: Whether to show a progress bar. An interrupt keeps what is done.

    Returns:
        A :class:`HeadSweep`: ``.values``, ``.effect`` and ``.normalised`` as ``[layer, head]``
        (then position, then prompt, where kept), ``.soft`` and ``.saturated``, ``.frame()``,
        ``.plot()``, ``.save()``.

    Raises:
        ArgumentError: An argument is none of those above; the metric gives no scalar, or does not
            depend on the output; the two inputs differ in shape.
        NonFiniteError: The metric gives NaN or infinity.
        HeadSelectionError: A head does not exist or repeats, or a group is empty.
        UnsupportedModelError: A chosen head, or the component of it, cannot be reached.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> metric = sl.metrics.logit_difference(answer=5, wrong=6)
        >>> sweep = sl.sweep_heads(model, "def f(x):", metric, heads=["L0H0", "L1H3"],
        ...                        progress=False)
        >>> sweep.frame().index.tolist(), sweep.values.shape
        (['L0H0', 'L1H3'], torch.Size([4, 8]))
    """
    check_choice("direction", direction, ("noising", "denoising"))
    check_choice("source", source, ("local", "run"))
    check_choice("component", component, COMPONENTS)
    check_choice("method", method, ("exact", "attribution", "screen"))
    check_choice("reduce", reduce, ("mean", None))
    check_choice("baseline", baseline, ("random", None))
    check_combination(source, component, method, transform, confirm)
    check_count("controls", controls)
    if not is_integer(seed):
        raise ArgumentError(f"seed is an integer; {seed!r} was given.")
    check_positions(positions)
    new = Limit() if transform is None else transform
    noising, from_run = direction == "noising", source == "run"
    n_draws = controls if baseline == "random" else 0

    # 1. Read what is swept over.
    reading: dict[str, Any] = {"attention_mask": attention_mask, "tokenizer": tokenizer}
    experiment, items, batch = Experiment.of(
        "sweep_heads", model, inputs, metric, heads, per_prompt=reduce is None, **reading
    )
    other = None if corrupted is None else read_batch(model, corrupted, "corrupted", **reading)
    if other is not None:
        check_same_shape(batch, other)

    with torch.no_grad():
        # 2. Run the model without a patch: record the run that is patched, take from the other.
        def unpatched(batch: Batch, attention: Transform | None, is_patched: bool) -> Baseline:
            take = component if from_run and not is_patched else None
            record = fast and is_patched
            return make_baseline(experiment, batch, attention, items, record=record, take=take)

        soft = unpatched(batch, None, noising)
        saturated = unpatched(batch, new, not noising)
        base, giving = (soft, saturated) if noising else (saturated, soft)
        check_depends(experiment.readout, model, batch, soft.value, saturated.value)
        other_soft = None if other is None else unpatched(other, None, not noising)

        # 3. List the patches: the sweep itself, then what it is compared with.
        def patch_of(put_in: Transform | None, taken: Mapping[str, Tensor]) -> Patch:
            from_where = FromRun(component, taken) if from_run else Local(put_in)
            return Patch(batch, None if noising else new, from_where)

        def patches() -> Iterator[tuple[str, Patch, Baseline]]:
            yield f"sweep, {direction}", patch_of(new if noising else None, giving.taken), base
            for i in range(n_draws):
                keys, taken = RandomKey(seed + i), {}
                if from_run:
                    taken = activations_of(experiment, batch, keys, component, items)
                yield f"random keys, {i + 1} of {controls}", patch_of(keys, taken), base
            if other is not None and other_soft is not None:
                into, of = (batch, other) if noising else (other, batch)
                taken = activations_of(experiment, of, None, component, items)
                run = soft if noising else other_soft
                yield "corruption", Patch(into, None, FromRun(component, taken)), run

        # 4. Compute every value of every patch.
        taken = FromRun(component, giving.taken) if from_run else None
        lengths = {} if positions is None else sequence_lengths(experiment, batch, items, taken)
        entries, shape = entries_of(items, positions, lengths)
        work = Work(experiment, entries, shape, seed, progress)
        tables, complete = _computed(work, patches(), method, confirm)

    # 5. Lay them out.
    draws = [table.values for table in tables[1 : 1 + n_draws]]
    labels = [item.label for item in items]
    at = range(shape[1]) if positions == "each" else positions
    return HeadSweep(
        provenance=provenance_of(model, new),
        arguments={
            "heads": {i.label: [*i.heads] for i in items} if items[0].is_group else labels,
            "direction": direction,
            "source": source,
            "component": component,
            "positions": positions if positions is None or positions == "each" else [*positions],
            "transform": None if transform is None else name_of(transform),
            "method": method,
            "reduce": reduce,
            "baseline": baseline,
            "controls": controls,
            "confirm": confirm,
            "seed": seed,
            "metric": repr(metric),
        },
        inputs={"input": batch.inputs, **batch.kwargs},
        corrupted=None if other is None else {"input": other.inputs, **other.kwargs},
        items=tuple(items),
        shapes=experiment.shapes,
        positions=None if at is None else tuple(at),
        soft=soft.value,
        saturated=saturated.value,
        item_values=tables[0].values,
        confirmed=tables[0].confirmed,
        random_values=torch.stack(draws) if draws else None,
        corrupted_soft=None if other_soft is None else other_soft.value,
        corruption_values=tables[-1].values if len(tables) > 1 + n_draws else None,
        checks=tables[0].checks,
        complete=complete,
    )


def _computed(
    work: Work, patches: Iterator[tuple[str, Patch, Baseline]], method: Method, confirm: float
) -> tuple[list[Evaluated], bool]:
    """Compute the tables of all patches; an interrupt keeps what is done."""
    tables: list[Evaluated] = []
    try:
        for name, patch, base in patches:
            like = tables[0] if tables else None
            tables.append(values_of(work, patch, base, name, method, confirm, like))
            if not tables[-1].complete:
                return tables, False
    except KeyboardInterrupt:
        if not tables:
            raise
        return tables, False
    return tables, True
