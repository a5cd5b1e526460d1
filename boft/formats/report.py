"""What a file or directory is: its format, origin, geometry, how far each factor turned, whether it is sound."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from boft.adapter import WEIGHTS_NAME, read_adapter_config
from boft.butterfly import angles, cayley, skew_matrix
from boft.errors import BOFTError
from boft.formats import names, peft
from boft.formats.foreign import ORIGIN_FILE, ORIGIN_KEY, file_header, origin_of
from boft.formats.recognise import CHECKPOINT, DIFFERENCE, KOHYA, LYCORIS, PEFT, recognise

OURS, DIFFUSERS = "boft", "diffusers"
WHAT = {
    OURS: "BOFT adapter",
    PEFT: "BOFT adapter of PEFT",
    KOHYA: "BOFT adapter of kohya (sd-scripts)",
    LYCORIS: "LyCORIS adapter, rotating the output side of each weight",
    DIFFERENCE: "weight differences (ComfyUI)",
    CHECKPOINT: "Stable Diffusion checkpoint, original layout",
    DIFFUSERS: "diffusers model",
}
# Float32's rounding in a block of hundreds of features stays well below.
ORTHOGONAL = 1e-4


@dataclass
class _Component:
    """What the layers of one component add up to; `degrees` holds a row of factors for each layer."""

    geometries: list[tuple[int, int, int]] = field(default_factory=list)
    parameters: int = 0
    degrees: list[list[float]] = field(default_factory=list)
    error: float = 0.0

    def add(self, tensor: Tensor, skew: Tensor | None) -> None:
        """Take a tensor in; one that holds a layer's rotation with its Q [m, r, b, b]."""
        if skew is None:
            self.parameters += tensor.numel()
            return
        m, r, b = skew.shape[:3]
        self.geometries.append((m, r, b))
        self.parameters += m * r * b * (b - 1) // 2
        if torch.isfinite(skew).all():
            blocks = cayley(skew)
            self.degrees.append(angles(blocks))
            identity = torch.eye(b, dtype=torch.float64)
            error = (blocks.double() @ blocks.double().mT - identity).abs().max()
            self.error = max(self.error, float(error))

    def facts(self) -> dict[str, Any]:
        """The sums, JSON-able; degrees by factor over the layers whose rotation is finite."""
        facts: dict[str, Any] = {"layers": len(self.geometries), "parameters": self.parameters}
        if self.geometries:
            facts |= {
                part: sorted(set(values))
                for part, values in zip("mrb", zip(*self.geometries, strict=True), strict=True)
            }
        if self.degrees:
            most = max(map(len, self.degrees))
            columns = [[row[k] for row in self.degrees if k < len(row)] for k in range(most)]
            facts["degrees"] = [{"mean": sum(column) / len(column), "most": max(column)} for column in columns]
            facts["orthogonality_error"] = self.error
        return facts


def inspect(source: str | os.PathLike) -> dict[str, Any]:
    """The facts of an adapter, a weight difference or a model, JSON-able. BOFTError for what is none of these."""
    source = Path(source)
    kind = recognise(source) or (DIFFUSERS if (source / "model_index.json").is_file() else OURS)
    config = read_adapter_config(source) if kind == OURS else {}
    report: dict[str, Any] = {"path": str(source), "format": kind, "what": WHAT[kind], "control": {}}
    report |= {key: config[key] for key in ("base_model", "prompts", "step", "control") if key in config}
    report |= {"tensors": 0, "parameters": 0}
    broken: list[str] = []
    components: dict[str, _Component] = {}
    for place, path in _files(source, kind):
        if kind != OURS:
            report |= _origin(path, source)
        for key, tensor in _tensors(path):
            report["tensors"] += 1
            report["parameters"] += tensor.numel()
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                broken.append(key)
            component, skew = _part(kind, place, key, tensor, config.get("layers", {}))
            if component is not None:
                components.setdefault(component, _Component()).add(tensor, skew)
    report |= {"finite": not broken, "not_finite": broken[:3]}
    if components:
        report["components"] = {component: found.facts() for component, found in components.items()}
        report["parameters"] = sum(found.parameters for found in components.values())
        report["orthogonal"] = not broken and all(found.error < ORTHOGONAL for found in components.values())
    return report


def readable(report: Mapping[str, Any]) -> str:
    """The facts as lines of text."""
    rows = [("base model", report.get("base_model")), ("step", report.get("step"))]
    rows += [("prompt", prompt) for prompt in report.get("prompts", ())]
    rows += [("control", f"{name} follows {head['kind'] or 'an image'}") for name, head in report["control"].items()]
    for component, facts in report.get("components", {}).items():
        geometry = ", ".join(f"{part}={_several(facts[part])}" for part in "mrb" if part in facts)
        rows.append((component, f"{geometry}, {facts['layers']} layers, {facts['parameters']:,} parameters"))
        for level, turned in enumerate(facts.get("degrees", ())):
            rows.append(
                (f"  factor {level}", f"{turned['mean']:.2f}° from the identity, at most {turned['most']:.2f}°")
            )
        if "orthogonality_error" in facts:
            rows.append(("  orthogonal", f"to {facts['orthogonality_error']:.1e}"))
    rows.append(("in all", f"{report['parameters']:,} parameters, {report['tensors']} tensors"))
    rows.append(("finite", "yes" if report["finite"] else f"no: {', '.join(report['not_finite'])}"))
    lines = [f"  {label:<14}{value}" for label, value in rows if value not in (None, "")]
    return "\n".join([f"{report['path']}: {report['what']}", *lines])


def _several(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}…{values[-1]}"


def _files(source: Path, kind: str) -> list[tuple[str, Path]]:
    """The safetensors files to read; with the component that PEFT keeps in each."""
    if kind == PEFT:
        return list(peft.places(source).items())
    if kind == DIFFUSERS:
        return [("", path) for path in sorted(source.rglob("*.safetensors"))]
    return [("", source / WEIGHTS_NAME if source.is_dir() else source)]


def _origin(path: Path, source: Path) -> dict[str, Any]:
    """What the export of a file, or of the directory that it is in, recorded."""
    metadata = dict(file_header(path)[1])
    if (source / ORIGIN_FILE).is_file():
        metadata[ORIGIN_KEY] = (source / ORIGIN_FILE).read_text(encoding="utf-8")
    origin = origin_of(metadata)
    return {key: origin[key] for key in ("base_model", "prompts", "step") if key in origin}


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise BOFTError(f"'{path}' is no readable safetensors file: {error}") from None


def _part(
    kind: str, place: str, key: str, tensor: Tensor, layers: Mapping[str, Any]
) -> tuple[str | None, Tensor | None]:
    """The component that a tensor belongs to, and its Q [m, r, b, b] where it holds a layer's rotation."""
    if kind == OURS:
        name, _, part = key.rpartition(".")
        entry = layers.get(name) if part == "boft_skew" else None
        return key.split(".", 1)[0], None if entry is None else skew_matrix(tensor.float(), entry["b"])
    if kind == PEFT:
        component = place
    elif kind in (KOHYA, LYCORIS) and (match := names.PREFIX.match(key)):
        component = names.COMPONENT_OF_PREFIX[match[1]]
    else:
        return None, None
    squares = tensor.float() if tensor.dim() == 4 else tensor.float()[None]
    if squares.dim() != 4 or squares.shape[2] != squares.shape[3]:
        return component, None
    if key.endswith(".boft_R"):
        return component, 0.5 * (squares - squares.mT)
    return component, squares.mT - squares if key.endswith(".oft_blocks") else None
