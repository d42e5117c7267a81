"""Findings about the devices that a map names, and the links between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise, permutations

from ..data.quantization_rules import ONE_DEVICE
from ..device_map import DeviceUse
from ..findings import Finding
from ..topology import WORST_RANK, link_rank
from ..units import format_gib
from .map_devices import OFF_GPU, shown, spelled
from .map_joins import about_joins, path
from .map_layout import Layout
from .map_question import Question, finding
from .quantized_rules import UNPACK_WHILE_LOADING, loses_hooks, method_of, refusal, why_not_unpacked
from .wording import listed

_MOST_PERMUTED = 6
"""720 orders are compared; with more GPUs the planner's own map is the better answer."""


def about_devices(question: Question, layout: Layout, given: Mapping[str, int | str]) -> Iterator[Finding]:
    """VLM617, VLM618 and VLM619."""
    yield from unusable_devices(question, layout, given)
    yield from misleading_spelling(question, layout, given)
    yield from off_gpu(question, layout)
    yield from parted_in_vain(question, layout)


def parted_in_vain(question: Question, layout: Layout) -> Iterator[Finding]:
    """A quantized checkpoint on several GPUs that cannot be loaded so, or cannot run so."""
    gpus = sorted({device for device in layout.device_map.values() if isinstance(device, int)})
    if len(gpus) < 2:
        return
    parted = f"The map parts the model over {listed([shown(gpu) for gpu in gpus])}"
    why = ONE_DEVICE.get(question.profile.quantization or "")
    if why is not None:
        yield finding(
            question,
            "VLM617",
            "error",
            f"{parted}: {why}.",
            cause="transformers refuses the map before it loads anything (RuntimeError).",
            fix="Put the whole model on one GPU.",
            devices=gpus,
        )
    lost = loses_hooks(question.profile, question.release)
    if lost is not None:
        too_old = why_not_unpacked(question.profile, question.release)
        yield finding(
            question,
            "VLM626",
            "error" if too_old else "warning",
            f"{parted}, and {too_old or lost}.",
            cause="\"'...' object has no attribute '_hf_hook'\" (AttributeError).",
            fix=UNPACK_WHILE_LOADING
            if too_old is None
            else "Put the whole model on one GPU, or install that transformers.",
            devices=gpus,
        )


def unusable_devices(question: Question, layout: Layout, given: Mapping[str, int | str]) -> Iterator[Finding]:
    """Devices that are not there, hidden, or of no use."""
    there = f"this process sees {_numbered(question)}"
    refused = {exclusion.gpu: exclusion.reason for exclusion in question.budgets.excluded}
    for device in dict.fromkeys(layout.device_map.values()):
        keys = [key for key, other in layout.device_map.items() if other == device]
        gpu = question.gpu_of(device)
        if isinstance(device, int) and gpu is None:
            problem = f"cuda:{device} does not exist: {there}"
        elif gpu in refused:
            problem = f"{shown(device)} is GPU {gpu}, which cannot be used: {refused[gpu]}"
        elif isinstance(device, str) and device not in OFF_GPU:
            why = next(spelled(given[key]).problem for key in keys)
            problem = (
                f"{device[:60]!r} is no device: {why}" if "that is no device" not in why else f"{device[:60]!r}: {why}"
            )
        else:
            continue
        yield finding(
            question,
            "VLM617",
            "error",
            f"{problem}; the map puts {listed([repr(key) for key in keys])} there.",
            cause="Numbers count the GPUs that CUDA shows the process, from 0, not those of nvidia-smi.",
            fix="Use the numbers of GPUs that this process sees, or change CUDA_VISIBLE_DEVICES.",
            seen=[(keys[0], given[keys[0]])],
        )


def _numbered(question: Question) -> str:
    if not question.gpus:
        return "no GPU"
    return listed([f"GPU {gpu} as cuda:{number}" for number, gpu in enumerate(question.gpus)], most=8)


def misleading_spelling(question: Question, layout: Layout, given: Mapping[str, int | str]) -> Iterator[Finding]:
    """Texts where numbers are meant."""
    values = {key: spelled(value) for key, value in given.items()}
    refused = [key for key, value in values.items() if value.problem and isinstance(value.device, int)]
    if refused:
        yield finding(
            question,
            "VLM618",
            "error",
            f"{refused[0]!r} is given the text {given[refused[0]]!r}: {values[refused[0]].problem}.",
            fix="Write numbers without quotation marks.",
            seen=[(key, given[key]) for key in refused[:3]],
        )
    texts = [key for key, value in values.items() if value.is_text]
    numbers = [key for key, value in values.items() if isinstance(value.device, int) and not value.is_text]
    if texts and numbers:
        yield finding(
            question,
            "VLM618",
            "warning",
            f"The map mixes texts ({texts[0]!r}: {given[texts[0]]!r}) and numbers ({numbers[0]!r}: {given[numbers[0]]!r}).",
            cause="To accelerate the same GPU in two spellings is two devices, and hooks are attached that nobody needs.",
            fix="Write numbers only.",
            seen=[(key, given[key]) for key in (texts[0], numbers[0])],
        )
    elif len({values[key].device for key in texts}) > 1:
        fault = _fault_by_chance(question, layout)
        yield finding(
            question,
            "VLM618",
            "error" if fault else "warning",
            f"Devices are given as texts, such as {given[texts[0]]!r}." + (f" In some runs {fault}" if fault else ""),
            cause="accelerate sends the inputs to the first of a set of devices; for texts that changes from run to run.",
            fix="Write numbers only.",
            seen=[(texts[0], given[texts[0]])],
        )


def _fault_by_chance(question: Question, layout: Layout) -> str:
    """What is wrong where accelerate sends the inputs to another GPU of the map, and is not where they go to the lowest."""

    def errors(where: Layout) -> list[str]:
        return [found.message for found in about_joins(question, where) if found.severity == "error"]

    known = errors(layout)
    others = sorted({device for device in layout.device_map.values() if isinstance(device, int)} - {layout.main})
    moved = (Layout(layout.anatomy, layout.device_map, main) for main in others)
    return next((message for where in moved for message in errors(where) if message not in known), "")


def off_gpu(question: Question, layout: Layout) -> Iterator[Finding]:
    """Weights on the CPU or the disk."""
    full = {name: layout.device_of.get(name, "missing") for names in layout.anatomy.tensors_of.values() for name in names}
    weights = layout.anatomy.weights(full)
    for place in OFF_GPU:
        keys = [key for key, device in layout.device_map.items() if device == place]
        if not keys:
            continue
        is_alone = not any(isinstance(device, int) for device in layout.device_map.values())
        seen = [(key, place) for key in keys[:3]]
        refused = refusal(question.profile, question.workload, place, is_alone=is_alone)
        if refused is not None:
            method = method_of(question.profile, question.workload)
            yield finding(
                question,
                "VLM619",
                "error",
                f"{listed([repr(key) for key in keys])} on the {place}: with {method} transformers refuses such a map.",
                cause=refused.error,
                fix=f"Keep every module on a GPU. {refused.way_out}".rstrip(),
                seen=seen,
            )
            continue
        size = format_gib(weights[place])
        yield finding(
            question,
            "VLM619",
            "info" if is_alone and place == "cpu" else "warning",
            f"{size} of weights are on the {place}: {listed([repr(key) for key in keys])}."
            + ("" if is_alone else f" Every new token copies them to {shown(layout.main)}."),
            cause="accelerate computes nothing on CPU or disk while there is a GPU in the map."
            if not is_alone
            else "No GPU is in the map.",
            fix="Use a map without offload, as the planner's own, or a smaller type of weights.",
            seen=seen,
        )


def about_links(question: Question, layout: Layout, uses: tuple[DeviceUse, ...]) -> Iterator[Finding]:
    """VLM622: the same stages, on the same GPUs, in an order with faster links."""
    visited = path(question, layout)
    need = {use.gpu: use for use in uses if use.gpu is not None}
    gpus = [gpu for gpu in map(question.gpu_of, visited) if gpu is not None]
    if len(gpus) != len(set(gpus)) or not 2 < len(gpus) <= _MOST_PERMUTED or set(gpus) != set(need):
        return
    wanted = [need[gpu].need_bytes for gpu in gpus]
    room = {gpu: need[gpu].available_bytes for gpu in gpus}

    def cost(order: tuple[int, ...]) -> int:
        return sum(link_rank(question.machine.link(a, b)) for a, b in pairwise(order))

    def holds(order: tuple[int, ...]) -> bool:
        return all(bytes_ is not None and bytes_ <= (room[gpu] or 0) for bytes_, gpu in zip(wanted, order, strict=True))

    present = cost(tuple(gpus))
    if present >= WORST_RANK * (len(gpus) - 1):
        return
    best = min((order for order in permutations(gpus) if holds(order)), key=cost, default=tuple(gpus))
    if cost(best) < present:
        yield finding(
            question,
            "VLM622",
            "info",
            f"The stages run on GPUs {', '.join(map(str, gpus))}; in the order {', '.join(map(str, best))} the links "
            "between them are faster.",
            cause="Hidden states cross a link at every border.",
            fix=f"Start with CUDA_VISIBLE_DEVICES={','.join(map(str, best))} and number the stages 0 to {len(best) - 1}.",
            devices=visited,
        )
