"""Write doctor/data/models/*.json: the models that vlm-doctor knows without their files.

Usage: python tools/make_catalogue.py

Needs torch and transformers. A native model is built on the meta device from its config, and its parameters are given the
names of the published checkpoint. For a model whose class lives in its checkpoint, the shapes are written out below from
the code that its authors published.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from catalogue_models import MODELS, Model, Shapes

TARGET = Path(__file__).resolve().parent.parent / "doctor" / "data" / "models"


def main() -> None:
    """Write one file a model."""
    TARGET.mkdir(exist_ok=True)
    for model in MODELS:
        tensors = model.tensors if model.tensors is not None else native_tensors(model)
        entry = {
            "name": model.name,
            "aliases": model.aliases,
            "source": model.source,
            "published": model.published,
            "dtype": model.dtype,
            "config": model.config,
            "tensors": tensors,
        }
        path = TARGET / (model.name.replace("/", "--") + ".json")
        path.write_text(layout(entry), encoding="utf-8")
        print(f"{path.name}: {sum(1 for _ in tensors)} patterns")


def native_tensors(model: Model) -> Shapes:
    """Build the class on the meta device and fold its parameters."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**copy.deepcopy(model.config))
    with torch.device("meta"):
        built = getattr(transformers, model.config["architectures"][0])(config)
    built.tie_weights()
    shapes = {name: list(parameter.shape) for name, parameter in built.named_parameters()}
    return fold({checkpoint_name(name, model.names): shape for name, shape in shapes.items()})


def checkpoint_name(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """The name under which the published checkpoint stores a parameter."""
    for ours, theirs in prefixes:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name


def fold(shapes: Shapes) -> Shapes:
    """Fold names that differ in one number into a range: ``layers.0`` to ``layers.31`` is ``layers.{0..31}``."""
    groups: dict[tuple[str, str], dict[int, list[int]]] = {}
    folded: Shapes = {}
    for name, shape in shapes.items():
        match = re.match(r"(.*?\.(?:layers|layer|blocks)\.)(\d+)(\..*)", name)
        if match:
            groups.setdefault((match[1], match[3]), {})[int(match[2])] = shape
        else:
            folded[name] = shape
    for (before, after), members in groups.items():
        first, last = min(members), max(members)
        same = len({tuple(shape) for shape in members.values()}) == 1
        if not same or sorted(members) != list(range(first, last + 1)):
            raise SystemExit(f"{before}N{after}: the layers differ; fold them by hand")
        folded[f"{before}{{{first}..{last}}}{after}"] = members[first]
    return folded


def layout(entry: dict[str, Any]) -> str:
    """JSON with one line a tensor, so that a change is one line in a diff."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(shape)}" for name, shape in entry["tensors"].items())
    head = json.dumps({key: value for key, value in entry.items() if key != "tensors"}, indent=2)
    return head.removesuffix("\n}") + ',\n  "tensors": {\n' + rows + "\n  }\n}\n"


if __name__ == "__main__":
    main()
