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

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sat_lens._checks import check_choice, check_evaluation_mode, require_lens_model
from sat_lens.attention import Limit, RandomKey, Transform
from sat_lens.data import Data
from sat_lens.metrics import Metric
from sat_lens.patching.activations import COMPONENTS, Component
from sat_lens.patching.arguments import (
    check_combination,
    check_draws,
    check_metric,
    check_same_shape,
    heads_argument,
    name_of,
    provenance_of,
    read_batch,
    shapes_of,
)
from sat_lens.patching.baselines import check_depends, make_baseline
from sat_lens.patching.exact import Measured, tasks_of
from sat_lens.patching.items import Groups, Positions, check_positions, read_items
from sat_lens.patching.lengths import lengths_of
from sat_lens.patching.methods import Job, Method
from sat_lens.patching.readout import Readout, check_not_padding
from sat_lens.patching.result import HeadSweep
from sat_lens.patching.runs import FromRun, Local, Patch, Setting, activations_of
from sat_lens.sites import Heads, attention_sites

Direction = Literal["noising", "denoising"]
Source = Literal["local", "run"]


def sweep_heads(
    model: Any,
    inputs: Data | Mapping[str, Any],
    metric: Metric,
    corrupted: Data | Mapping[str, Any] | None = None,
    heads: Heads | Groups = None,
    direction: Direction = "noising",
    source: Source = "local",
    component: Component = "z",
    positions: Positions = None,
    transform: Transform | None = None,
    method: Method = "exact",
    reduce: Literal["mean"] | None = "mean",
    *,
    baseline: Literal["random"] | None = None,
    controls: int = 5,
    confirm: float = 0.2,
    fast: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> HeadSweep:
    """Patch one head after the other between the soft and the saturated run; measure the output.

    Args:
        model: A TransformerLens model in evaluation mode.
        inputs: One prompt, a list of prompts, tokens ``[batch, position]``, or a dict of the
            model's own arguments (``input``, ``attention_mask``, ...).
        metric: A function of the logits that gives a scalar. One that names the positions it reads
            in ``.positions``, as those of :mod:`sat_lens.metrics` do, is served faster.
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
    check_metric(metric)
    check_draws(controls, seed)
    check_positions(positions)
    require_lens_model(model, "sweep_heads")
    sites = attention_sites(model)
    check_evaluation_mode(sites)
    items = read_items(sites, heads)
    batch = read_batch(model, inputs, "inputs")
    other = None if corrupted is None else read_batch(model, corrupted, "corrupted")
    check_same_shape(batch, other)
    setting = Setting(model, sites, Readout(metric, reduce is None, batch.size))
    new = Limit() if transform is None else transform
    noising = direction == "noising"
    taken = component if source == "run" else None
    random_keys = [RandomKey(seed + i) for i in range(controls if baseline == "random" else 0)]

    with torch.no_grad():
        soft, saturated = (
            make_baseline(
                setting,
                batch,
                attention,
                items,
                record=fast and noising == (attention is None),
                take=taken if noising == (attention is new) else None,
            )
            for attention in (None, new)
        )
        check_not_padding(setting.readout.named, batch)
        check_depends(setting.readout, soft.value, saturated.value, lambda: batch.run(model))
        base, source_run = (soft, saturated) if noising else (saturated, soft)
        lengths = (
            {}
            if positions is None
            else lengths_of(setting, batch, items, component, source_run.taken)
        )
        tasks, n_positions = tasks_of(items, positions, lengths)
        job = Job(setting, tasks, len(items), n_positions, method, confirm, seed, progress)

        def patched(put_in: Transform | None, activations: Mapping[str, Tensor]) -> Patch:
            filling = FromRun(component, activations) if taken else Local(put_in)
            return Patch(batch, None if noising else new, filling)

        patch = patched(new if noising else None, source_run.taken)
        main = job.run(patch, base.value, base.record, f"sweep, {direction}")
        draws: list[Tensor] = []
        corrupted_soft = corruption = None
        try:
            _go_on_if(main.measured)
            for i, keys in enumerate(random_keys):
                patch = patched(
                    keys, activations_of(setting, batch, keys, taken, items) if taken else {}
                )
                name = f"random keys, {i + 1} of {controls}"
                control = job.run(patch, base.value, base.record, name, main).measured
                draws.append(control.values)
                _go_on_if(control)
            if other is not None:
                corrupted_run = make_baseline(
                    setting, other, None, items, record=fast and not noising
                )
                corrupted_soft = corrupted_run.value
                base, into, of = (soft, batch, other) if noising else (corrupted_run, other, batch)
                activations = activations_of(setting, of, None, component, items)
                patch = Patch(into, None, FromRun(component, activations))
                axis = job.run(patch, base.value, base.record, "corruption", main).measured
                corruption = axis.values
                _go_on_if(axis)
            complete = True
        except KeyboardInterrupt:
            complete = False
    return HeadSweep(
        provenance=provenance_of(model, new),
        arguments={
            "heads": heads_argument(items),
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
        shapes=shapes_of(sites),
        positions=_shown_positions(positions, n_positions),
        soft=soft.value,
        saturated=saturated.value,
        item_values=main.measured.values,
        confirmed=main.confirmed,
        random_values=torch.stack(draws) if draws else None,
        corrupted_soft=corrupted_soft,
        corruption_values=corruption,
        checks=main.checks,
        complete=complete,
    )


def _go_on_if(measured: Measured) -> None:
    """Pass on an interrupt that measuring has caught, to keep what was done."""
    if not measured.complete:
        raise KeyboardInterrupt


def _shown_positions(positions: Positions, n_positions: int | None) -> tuple[int, ...] | None:
    if positions is None or n_positions is None:
        return None
    return tuple(range(n_positions)) if isinstance(positions, str) else tuple(positions)
