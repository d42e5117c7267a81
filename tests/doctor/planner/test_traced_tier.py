"""Prices by traces: fits, peaks, and the planner that uses them. Traces of real models: ``tests/models/test_trace.py``."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_doctor import load_machine, load_profile
from vlm_doctor.machine import Machine
from vlm_doctor.model import ModelProfile
from vlm_doctor.planner import plan
from vlm_doctor.planner.constraints import chain
from vlm_doctor.planner.image_tokens import image_load
from vlm_doctor.planner.memory import Footprint, Holding
from vlm_doctor.planner.replay import Held
from vlm_doctor.planner.traced import Growth, IrregularError, Regimes, Timeline, lengths
from vlm_doctor.planner.traced_footprint import TracedFootprint, obstacle, trace_request
from vlm_doctor.planner.traced_replay import TracedProgram
from vlm_doctor.trace import BEFORE, TOWER, Event, Pictures, Trace, Traces
from vlm_doctor.units import GIB, MIB
from vlm_doctor.workload import Policy, Training, Workload

from .profiles import glm41v_9b
from .traces import any_trace, small_trace, traces_of

TEXT = Workload(images=0, text_tokens=1000, new_tokens=2)


def runs(**fields: Any) -> list[Trace]:
    return [small_trace(tokens, **fields) for tokens in (65, 577, 1089, 3649)]


@pytest.mark.parametrize("tokens", [1, 64, 1000, 8192, 100_000])
def test_three_lengths_give_every_other(tokens: int) -> None:
    assert Growth(runs()).at(tokens).events == small_trace(tokens).events


def test_what_is_behind_the_prompt_can_be_that_of_later() -> None:
    grown = Growth(runs()).at(1000, new_tokens=500)
    begin = grown.decode_begin()
    assert grown.events[:begin] == small_trace(1000).events[:begin]
    assert grown.events[begin:] == small_trace(1500).events[begin:]


def test_other_code_for_other_lengths_is_refused() -> None:
    with pytest.raises(IrregularError, match="prompts of 65 and 3649 tokens run different code"):
        Growth([*runs()[:3], small_trace(3649, layers=2)])


def test_a_size_that_follows_no_polynomial_is_refused() -> None:
    last = small_trace(3649)
    events = [msgspec.structs.replace(one, size_bytes=one.size_bytes + 1) for one in last.events[:1]]
    with pytest.raises(IrregularError, match="a tensor of 520 bytes grows in no regular way"):
        Growth([*runs()[:3], msgspec.structs.replace(last, events=(*events, *last.events[1:]))])


def test_short_prompts_have_no_less_than_a_byte() -> None:
    shape = [
        Trace(
            tokens=tokens,
            layers=1,
            modules=("",),
            events=(Event(1, tokens - 50, BEFORE, 0), Event(1, 50 - tokens, 0, 0)),
            passes=(0,),
        )
        for tokens in (65, 577, 1089)
    ]
    assert [event.size_bytes for event in Growth(shape).at(10).events] == [1, -1]


@given(st.integers(0, 5000), st.none() | st.integers(1, 9000), st.integers(0, 2), st.integers(0, 16))
def test_lengths_are_four_of_each_program(image_tokens: int, window: int | None, steps: int, experts: int) -> None:
    found = lengths(image_tokens, window, steps, experts)
    assert min(found) > image_tokens
    assert not experts or min(found) * experts > 4096, "few tokens of experts are sorted by another program"
    within = [tokens for tokens in found if window is not None and tokens <= window]
    assert len(within) in ((0, 4) if window is not None else (0,))
    assert len(found) - len(within) == 4
    assert all(tokens + steps <= window for tokens in within if window is not None)
    assert all(tokens % 8 == 1 for tokens in found)
    assert list(found) == sorted(set(found))


def test_a_window_parts_two_programs() -> None:
    within = [small_trace(tokens, layers=2) for tokens in (65, 129, 193, 513)]
    regimes = Regimes(traces_of([*within, *(small_trace(tokens) for tokens in (1033, 1545, 2057, 4617))]), 1024)
    assert regimes.at(1000).layers == 2
    assert regimes.at(1000, new_tokens=25).layers == 3
    assert regimes.at(1025).layers == 3
    assert Regimes(traces_of(runs()), 32).at(20).layers == 3


@given(any_trace(), st.data())
def test_the_quick_peak_is_the_peak(trace: Trace, data: st.DataObject) -> None:
    places = frozenset(data.draw(st.sets(st.integers(TOWER, trace.layers))))
    peak, place, phase = Timeline(trace).peak(places)
    slow = trace.peak(places)
    assert peak == slow.size_bytes
    if peak:
        assert place in places
        assert phase != "answer" or len(trace.passes) > 1
        assert phase != "return" or place == BEFORE


@given(any_trace(), st.data())
def test_more_places_never_need_less(trace: Trace, data: st.DataObject) -> None:
    """But for a copy of what is made elsewhere, which may outlive the tensor itself until its place has done its work."""
    places = frozenset(data.draw(st.sets(st.integers(TOWER, trace.layers))))
    more = places | frozenset(data.draw(st.sets(st.integers(TOWER, trace.layers))))
    copies = sum(-event.size_bytes + 511 for event in trace.events if event.size_bytes < 0)
    timeline = Timeline(trace)
    assert timeline.peak(more)[0] + copies >= timeline.peak(places)[0]


def test_the_cache_is_what_layers_keep() -> None:
    timeline = Timeline(small_trace(1000))
    # The states of the last layer go at the head, whose work is the last of the prompt's.
    assert timeline.kept(frozenset({0, 1})) == 2 * 128_000
    assert timeline.kept(frozenset({TOWER, BEFORE, 3})) == 0


class TestFootprint:
    profile = glm41v_9b()

    def prices(self, workload: Workload = TEXT, **fields: Any) -> TracedFootprint:
        load = image_load(self.profile, workload)
        layers = self.profile.text.layers
        made = traces_of([small_trace(tokens, layers=layers, has_tower=bool(load.tokens)) for tokens in (65, 577, 1089)])
        return TracedFootprint(self.profile, workload, load, chain(self.profile).atoms, traces=made, **fields)

    def test_a_run_of_atoms_has_its_weights_its_peak_and_what_the_allocator_wastes(self) -> None:
        prices, formulas = (
            self.prices(),
            Footprint(self.profile, TEXT, image_load(self.profile, TEXT), chain(self.profile).atoms),
        )
        atoms, layers = len(prices.atoms), self.profile.text.layers
        bare = self.prices(is_bare=True)
        trace = small_trace(1000, layers=layers, has_tower=False)
        for run, places in (
            ((0, atoms), trace.held()),
            ((0, 4), trace.held(TOWER, 3)),
            ((4, 9), trace.held(3, 8)),
            ((9, atoms), trace.held(8)),
        ):
            detail, simple = prices.detail(*run, 1000), formulas.detail(*run, 1000)
            assert detail.weights_bytes == simple.weights_bytes
            assert detail.kv_cache_bytes + detail.activations_bytes == trace.peak(places).size_bytes
            assert detail.fragmentation_bytes == simple.fragmentation_bytes
            assert prices.needs(1000)(*run) == detail.total_bytes
            assert bare.needs(1000)(*run) == detail.total_bytes - detail.fragmentation_bytes
        assert "traced: Made of transformers 5.23, torch 2.13" in prices.source
        self.profile = glm41v_9b(is_remote_code=True)
        assert self.prices().source == "traced: Made of the checkpoint's own code, transformers 5.23, torch 2.13"

    def test_what_happens_at_the_peak_is_said(self) -> None:
        layers = self.profile.text.layers
        parts = {
            "a layer reads the prompt": Holding(
                weights_bytes=1, layers=3, has_tower=False, has_embedding=False, has_head=False
            ),
            "the vision tower runs": Holding(
                weights_bytes=1, layers=0, has_tower=True, has_embedding=False, has_head=False
            ),
            "the prompt is embedded": Holding(
                weights_bytes=1, layers=0, has_tower=False, has_embedding=True, has_head=False
            ),
            "the head computes logits": Holding(
                weights_bytes=1, layers=0, has_tower=False, has_embedding=False, has_head=True
            ),
        }
        prices = self.prices(Workload(images=1, image_height=336, text_tokens=1000, new_tokens=2))
        for moment, holding in parts.items():
            assert prices.need_of(holding, 1000).moment == moment
        last = Holding(weights_bytes=1, layers=2, has_tower=False, has_embedding=False, has_head=True)
        trace = small_trace(1000, layers=layers, has_tower=False)
        need = self.prices().need_of(last, 1000)
        assert need.total_bytes - 1 == trace.peak(trace.held(layers - 2)).size_bytes

    @pytest.mark.parametrize("stages", [1, 2])
    def test_logits_that_come_back_are_called_so(self, stages: int) -> None:
        asked = Workload(images=0, text_tokens=1000, logits="forward")
        runs = [
            small_trace(tokens, layers=self.profile.text.layers, more=0, has_tower=False, returned_bytes=300_000)
            for tokens in (65, 577, 1089)
        ]
        policy = Policy(min_gpus=stages)
        for traces in (traces_of(runs), None):
            made = plan(self.profile, load_machine("80GiB,80GiB"), asked, policy, traces=traces)
            first, last = made.stages[0], made.stages[-1]
            (told,), (head,) = (
                [line.label for line in stage.ledger if line.kind == "activations"] for stage in (first, last)
            )
            assert head == "activations, largest while the head computes logits"
            assert stages == 1 or told == "activations, largest while the logits come back"

    def test_no_trace_tells_what_loading_takes(self) -> None:
        dense = glm41v_9b().text
        self.profile = glm41v_9b(text=msgspec.structs.replace(dense, experts=64, active_experts=8, expert_width=512))
        prices = self.prices(is_bare=True)
        layer = prices.weights_of(3, 4)
        need = prices.detail(3, 4, 1)
        assert (need.moment, need.total_bytes) == ("the weights are loaded", 2 * layer)
        assert prices.needs(1)(3, 4) == 2 * layer
        assert prices.detail(3, 4, 1_000_000).moment != "the weights are loaded"

    def test_a_long_answer_is_the_peak_of_a_short_prompt(self) -> None:
        prices = self.prices(msgspec.structs.replace(TEXT, text_tokens=1, new_tokens=100_000))
        assert prices.detail(1, 20, 1).moment == "the next token is made"
        assert prices.detail(1, 20, 1).kv_cache_bytes > 0

    def test_only_other_lengths_are_told_by_the_same_traces(self) -> None:
        prices = self.prices()
        longer = msgspec.structs.replace(TEXT, text_tokens=5000)
        load = image_load(self.profile, TEXT)
        assert isinstance(prices.changed(longer, load, is_bare=False), TracedFootprint)
        assert prices.changed(longer, load, is_bare=False).needs(5000)(0, 5) == prices.needs(5000)(0, 5)
        for other in ({"batch": 2}, {"dtype": "float32"}, {"attention": "eager"}, {"new_tokens": 0}):
            changed = prices.changed(msgspec.structs.replace(TEXT, **other), load, is_bare=False)
            assert type(changed) is Footprint

    def test_few_lengths_are_kept(self) -> None:
        prices = self.prices()
        first = prices.needs(1000)(0, 3)
        for tokens in range(2000, 2020):
            prices.needs(tokens)(0, 3)
        assert prices.needs(1000)(0, 3) == first


class TestReplay:
    program = TracedProgram(Regimes(traces_of(runs()), None), ("full", "sliding", "full"), new_tokens=2)

    def test_peaks_are_those_of_the_trace(self) -> None:
        trace = small_trace(100_000)
        held = Held(kinds=("full", "sliding", "full"), weights_bytes=3 * MIB, is_first=True, has_head=True)
        allocated, reserved = self.program.peaks(held, 100_000)
        # Tensors up to 1 MiB that are brief are left out; a block may be up to 1 MiB larger than its tensor.
        assert allocated == pytest.approx(trace.peak().size_bytes, abs=10 * MIB)
        assert reserved >= allocated + 3 * MIB

    def test_small_tensors_that_are_brief_share_a_segment(self) -> None:
        held = Held(kinds=("full", "sliding", "full"), weights_bytes=3 * MIB, is_first=True, has_head=True)
        allocated, _ = self.program.peaks(held, 64)
        # All but the temporary of a layer, which has 4,096 bytes a token and one for each pair.
        assert allocated == pytest.approx(small_trace(64).peak().size_bytes - 4096 * 64 - 64**2, rel=0.05)

    def test_small_keys_and_values_are_not_left_out(self) -> None:
        """Each less than 1 MiB, all of them a third of what lives at once."""
        tokens, layers = 8_000, 40
        many = Regimes(traces_of([small_trace(length, layers=layers) for length in lengths(0, None, 2)]), None)
        held = Held(kinds=("full",) * layers, weights_bytes=3 * MIB, is_first=True, has_head=True)
        allocated, _ = TracedProgram(many, (), new_tokens=2).peaks(held, tokens)
        assert allocated == pytest.approx(small_trace(tokens, layers=layers).peak().size_bytes, rel=0.01)

    @pytest.mark.parametrize(
        ("held", "places"),
        [
            (Held(kinds=("full",), weights_bytes=0, is_first=True, has_head=False), {TOWER, BEFORE, 0}),
            (Held(kinds=("sliding",), weights_bytes=0, is_first=False, has_head=False), {1}),
            (Held(kinds=("full",), weights_bytes=0, is_first=False, has_head=False), {2}),
            (Held(kinds=("unknown",), weights_bytes=0, is_first=False, has_head=False), {1}),
            (Held(kinds=("sliding", "full"), weights_bytes=0, is_first=False, has_head=True), {1, 2, 3}),
            (Held(kinds=(), weights_bytes=0, is_first=False, has_head=True), {3}),
        ],
    )
    def test_a_stage_is_found_by_its_kinds_of_layers(self, held: Held, places: set[int]) -> None:
        assert self.program.places_of(held, 1000) == places

    def test_it_runs_in_what_it_reserves_and_not_in_less_than_it_needs(self) -> None:
        held = Held(kinds=("full", "sliding", "full"), weights_bytes=3 * MIB, is_first=True, has_head=True)
        allocated, reserved = self.program.peaks(held, 20_000)
        assert self.program.runs(held, 20_000, reserved)
        assert not self.program.runs(held, 20_000, allocated)


class TestRequest:
    machine = load_machine("2xL4")

    @pytest.mark.parametrize(
        ("profile", "workload", "reason"),
        [
            (
                {"is_remote_code": True},
                {},
                "its class is code of the checkpoint: read it, and if you trust it, add --trust-remote-code (in Python "
                "trust_remote_code=True)",
            ),
            ({"quantization": "awq"}, {}, "kernels of quantized weights run on GPUs only"),
            ({}, {"quantization": "nf4"}, "kernels of quantized weights run on GPUs only"),
            ({}, {"training": Training()}, "a training step is not traced"),
            (
                {},
                {"is_padded": True, "batch": 2},
                "prompts of different length, whose padding a mask hides, are not traced",
            ),
            ({"image": None}, {"images": 1}, "its image rule is unknown"),
            ({"image": None}, {}, None),
            ({}, {}, None),
        ],
    )
    def test_what_cannot_be_traced(self, profile: dict[str, Any], workload: dict[str, Any], reason: str | None) -> None:
        model = msgspec.structs.replace(glm41v_9b(), **profile)
        assert obstacle(model, msgspec.structs.replace(TEXT, **workload)) == reason

    def test_code_that_is_trusted_can_be_traced_and_is_asked_for_with_hidden_states_without_data(self) -> None:
        own = msgspec.structs.replace(glm41v_9b(), is_remote_code=True)
        assert obstacle(own, TEXT, trust_remote_code=True) is None
        text = trace_request(own, TEXT, self.machine)
        assert (text.is_remote_code, text.image_tokens) == (True, 0)
        assert min(text.lengths) * 4096 > 2**22 > min(trace_request(glm41v_9b(), TEXT, self.machine).lengths) * 4096
        asked = Workload(images=2, image_height=336)
        request = trace_request(own, asked, self.machine)
        assert request.image_tokens == image_load(own, asked).tokens
        assert trace_request(glm41v_9b(), asked, self.machine).image_tokens == 0

    def test_text(self) -> None:
        request = trace_request(glm41v_9b(), TEXT, self.machine)
        assert len(request.layers) == 40
        assert request.tower == ()
        assert (request.pictures, request.steps, request.attention) == (None, 2, "sdpa")
        assert not request.cudnn_width

    def test_images(self) -> None:
        request = trace_request(glm41v_9b(), Workload(images=2, image_height=336, image_width=672), self.machine)
        assert request.tower
        assert request.pictures == Pictures(
            images=2, height=336, width=672, sequences=2, run_height=336, run_width=672, patches=24 * 48, patch=14, merge=2
        )

    @pytest.mark.parametrize("images", [1, 64, 100])
    def test_a_word_behind_each_image_has_room(self, images: int) -> None:
        asked = Workload(images=images, image_height=56, image_width=56, text_tokens=0)
        request = trace_request(glm41v_9b(), asked, self.machine)
        assert min(request.lengths) >= image_load(glm41v_9b(), asked).tokens + max(64, images)

    def test_images_of_a_size_that_nobody_names_are_those_that_the_plan_counts(self) -> None:
        """InternVL shows one tile of an image as large as a tile, and twelve beside the whole at most."""
        model = load_profile("OpenGVLab/InternVL3-8B-hf", allow_network=False)
        load = image_load(model, Workload(images=1))
        found = trace_request(model, Workload(images=1), self.machine).pictures
        assert found is not None
        assert (found.sequences, load.sequences) == (13, 13)
        assert image_load(model, Workload(images=1, image_height=found.height, image_width=found.width)) == load

    @pytest.mark.parametrize(
        ("fields", "steps"),
        [({"logits": "forward"}, 0), ({"new_tokens": 0}, 1), ({"new_tokens": 1}, 1), ({"new_tokens": 9}, 2)],
    )
    def test_steps(self, fields: dict[str, Any], steps: int) -> None:
        assert trace_request(glm41v_9b(), msgspec.structs.replace(TEXT, **fields), self.machine).steps == steps

    @pytest.mark.parametrize(("spec", "width"), [("2xH100", 256), ("H100+L4", 0), ("24GiB", 0)])
    def test_kernels_of_the_gpus(self, spec: str, width: int) -> None:
        assert trace_request(glm41v_9b(), TEXT, load_machine(spec)).cudnn_width == width

    def test_types_without_kernels_are_traced_in_sixteen_bit(self) -> None:
        model = msgspec.structs.replace(glm41v_9b(), dtype="float8_e4m3fn")
        assert trace_request(model, TEXT, self.machine).dtype == "bfloat16"
        assert trace_request(model, msgspec.structs.replace(TEXT, dtype="float32"), self.machine).dtype == "float32"


class TestPlan:
    machine: Machine = load_machine("2x24GiB")
    profile: ModelProfile = glm41v_9b()

    def traces(self, **fields: Any) -> Traces:
        return traces_of(
            [
                small_trace(tokens, layers=self.profile.text.layers, has_tower=False, **fields)
                for tokens in (65, 577, 1089, 3649)
            ]
        )

    def test_formulas_are_the_usual_tier(self) -> None:
        assert plan(self.profile, self.machine, TEXT).tier == "formulas"

    def test_a_traced_plan_says_so_and_has_the_peak_of_the_trace(self) -> None:
        answer = plan(self.profile, self.machine, TEXT, traces=self.traces())
        trace = small_trace(1000, layers=self.profile.text.layers, has_tower=False)
        assert answer.tier == "traced"
        assert answer.fits
        stage = answer.stages[0]
        counted = sum(line.size_bytes for line in stage.ledger if line.kind in ("kv_cache", "activations"))
        assert counted == pytest.approx(trace.peak().size_bytes, abs=50 * MIB)
        assert "Activations: traced: Made of transformers 5.23, torch 2.13." in answer.notes
        assert sum(line.size_bytes for line in stage.ledger) == 24 * GIB

    def test_a_plan_that_could_not_be_traced_says_why(self) -> None:
        answer = plan(self.profile, self.machine, TEXT, untraced="torch is not installed.")
        assert answer.tier == "formulas"
        assert answer.notes[-1] == "The model was not traced, so that memory is told by formulas: torch is not installed."

    def test_traces_that_tell_nothing_about_other_lengths_are_not_used(self) -> None:
        bad = traces_of([small_trace(65), small_trace(577), small_trace(1089, layers=2)])
        answer = plan(self.profile, self.machine, TEXT, traces=bad)
        assert answer.tier == "formulas"
        assert "prompts of 65 and 1089 tokens run different code" in answer.notes[-1]

    def test_a_plan_that_does_not_fit_has_levers_by_formulas(self) -> None:
        answer = plan(self.profile, load_machine("12GiB"), TEXT, traces=self.traces())
        assert not answer.fits
        assert answer.tier == "traced"
        assert answer.shortage is not None
        assert answer.shortage.levers
