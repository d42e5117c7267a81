"""The fixtures: a ladder of small session fixtures, each of which a conftest may override, up to the loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from .state import WATCH, gate_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm_doctor.machine import Gpu, Machine
    from vlm_doctor.report import Report
    from vlm_doctor.workload import Policy, Workload

    from .fakes.images import TestImages
    from .gating.gate import Loader, Planner
    from .models.ladder import VlmFactory
    from .watching.vram import VramMeter


def __dir__() -> list[str]:
    """Fixtures alone: pytest looks at everything that a plugin lists, twice."""
    return [name for name in globals() if name.lstrip("_").startswith("vlm")]


@pytest.fixture(scope="session")
def vlm_machine(request: pytest.FixtureRequest) -> Machine:
    """The machine that decides which tests run: this one, or that of --vlm-machine."""
    return gate_of(request.config).machine()


@pytest.fixture(scope="session")
def vlm_workload() -> Workload:
    """The largest call that tests make, for which every model is placed. Override it to say yours."""
    from vlm_doctor.workload import Workload

    return Workload()


@pytest.fixture(scope="session")
def vlm_policy() -> Policy:
    """How careful placements are, and what they prefer. Override it to change that."""
    from vlm_doctor.workload import Policy

    return Policy()


@pytest.fixture(scope="session")
def vlm_planner(request: pytest.FixtureRequest, vlm_workload: Workload, vlm_policy: Policy) -> Planner:
    """Function (spec, machine, GPU indices) -> Plan. Override it to place models by your own rules.

    It may return ``None`` (do not plan) together with a ``vlm_loader`` of your own.
    """
    from .models.ladder import make_planner

    config = request.config
    may_offload = gate_of(config).settings.allow_offload
    return make_planner(vlm_workload, vlm_policy, may_offload=may_offload, asking=lambda: gate_of(config).fitting.asking)


@pytest.fixture(scope="session")
def vlm_loader(request: pytest.FixtureRequest) -> Loader:
    """Function (spec, plan) -> context manager that holds a loaded model. Override it to load with another engine.

    ``plan`` is ``None`` on a CPU run. The value of the context manager is that of the fixture ``vlm``; where it has a
    ``device_map`` (or a ``model`` with ``hf_device_map``), that is held against the plan.
    """
    from .models.ladder import make_loader

    return make_loader(gate_of(request.config), request.config)


@pytest.fixture(scope="session")
def _vlm_residents(request: pytest.FixtureRequest, vlm_loader: Loader) -> Iterator[None]:  # noqa: ARG001 - outlives it
    """At the end of the session, unload the models that were kept (--vlm-slots=fit)."""
    yield
    gate_of(request.config).residents.remove_all()


@pytest.fixture(scope="session")
def vlm(request: pytest.FixtureRequest, vlm_loader: Loader, _vlm_residents: None) -> Iterator[Any]:
    """The model that @pytest.mark.vlm("org/model") or --vlm-model names, loaded once a session (LoadedVlm)."""
    gate = gate_of(request.config)
    with gate.loaded(gate.spec_asked_for(request), request, vlm_loader) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def vlm_model(vlm: Any) -> Any:
    """The model of ``vlm``."""
    return vlm.model


@pytest.fixture(scope="session")
def vlm_processor(vlm: Any) -> Any:
    """The processor of ``vlm``."""
    return vlm.processor


@pytest.fixture(scope="session")
def vlm_device_map(vlm: Any) -> dict[str, int | str]:
    """Where the modules of ``vlm`` are: module path to CUDA ordinal, or ``cpu`` for what is offloaded; empty on the CPU."""
    device_map: dict[str, int | str] = vlm.device_map
    return device_map


@pytest.fixture(scope="session")
def vlm_gpus(request: pytest.FixtureRequest, vlm_machine: Machine) -> tuple[Gpu, ...]:
    """The GPUs that tests may use (CUDA_VISIBLE_DEVICES, --vlm-gpus), in CUDA order. Loads nothing."""
    return gate_of(request.config).usable_gpus(vlm_machine, request)


@pytest.fixture(scope="session")
def vlm_device(request: pytest.FixtureRequest) -> str:
    """The first GPU that tests may use in torch's words, ``cuda:0``; ``cpu`` with --vlm-gpus=none. Loads nothing."""
    return gate_of(request.config).first_device(request)


@pytest.fixture(scope="session")
def vlm_images() -> TestImages:
    """Small generated pictures and frames, the same each time: ``vlm_images[0]``, ``.picture()``, ``.frames(8)``."""
    from .fakes.images import TestImages

    return TestImages()


@pytest.fixture(scope="session")
def vlm_factory(request: pytest.FixtureRequest, vlm_loader: Loader) -> VlmFactory:  # noqa: ARG001 - ends before it does
    """For models that are chosen at run time, gated and placed like all: ``with`` what it returns for a name."""
    from .models.ladder import make_factory

    return make_factory(gate_of(request.config), request)


@pytest.fixture(scope="class")
def vlm_cls(request: pytest.FixtureRequest, vlm: Any) -> Iterator[None]:
    """Give the tests of a class ``self.vlm``, for suites of unittest.TestCase: ``@pytest.mark.usefixtures("vlm_cls")``."""
    owner: Any = request.cls
    if owner is None:
        pytest.fail("VLM720: the fixture vlm_cls sets an attribute of a class, and this test is in none.", pytrace=False)
    owner.vlm = vlm
    yield
    del owner.vlm


@pytest.fixture(scope="session")
def vlm_doctor(vlm_machine: Machine) -> Report:
    """What vlm-doctor says about the machine, except for what only torch could tell. It never skips a test."""
    from vlm_doctor.answer import check_report

    return check_report(vlm_machine)


@pytest.fixture
def vlm_vram() -> Iterator[VramMeter]:
    """GPU memory of the test: ``.peak_gib``, ``.used_gib``, ``.peaks_gib()`` by CUDA ordinal, ``.reset()``."""
    from .watching.vram import VramMeter

    meter = VramMeter()
    yield meter
    meter.close()


@pytest.fixture
def _vlm_watch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Watch what a test does to the shared model and to memory. It is put before the test's own fixtures."""
    watch = request.config.stash[WATCH]
    watch.begin(request)
    yield
    watch.end(request)


@pytest.fixture
def _vlm_gate(request: pytest.FixtureRequest) -> None:
    """Decide about a gated test. It is put before all other fixtures of such a test when the test is collected."""
    gate_of(request.config).decide(request)
