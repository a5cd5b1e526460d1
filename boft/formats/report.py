"""What a file or directory is: its format, origin, geometry, how far each factor turned, whether it is sound."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boft.adapter import WEIGHTS_NAME, check_headers
from boft.butterfly import angles, cayley, skew_matrix
from boft.errors import BOFTError, printable
from boft.files import FLOATS, header_of, opened, read_text, why_no_file
from boft.formats import names, peft
from boft.formats.foreign import ORIGIN_FILE, ORIGIN_KEY, file_header, origin_of, require_butterfly, require_floats
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
# Eight-bit floats, of which some checkpoints are.
_EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")
# More, and PyTorch computes nothing of a tensor.
_MOST_AXES = 64
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
    kind = recognise(source) or (DIFFUSERS if os.path.isfile(source / "model_index.json") else OURS)
    config = check_headers(source) if kind == OURS else {}
    report: dict[str, Any] = {"path": str(source), "format": kind, "what": WHAT[kind], "control": {}}
    report |= {key: config[key] for key in ("base_model", "prompts", "step", "control") if key in config}
    report |= {"tensors": 0, "parameters": 0}
    broken: list[str] = []
    components: dict[str, _Component] = {}
    for place, path in _files(source, kind):
        if kind != OURS:
            report |= _origin(path, source)
        for key, size, tensor in _tensors(path, is_adapter=kind in (OURS, PEFT, KOHYA, LYCORIS)):
            report["tensors"] += 1
            report["parameters"] += size
            if tensor is None:
                continue
            if not torch.isfinite(tensor).all():
                broken.append(key)
            component, skew = _part(kind, place, path, key, tensor, config.get("layers", {}))
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
    return "\n".join(map(printable, [f"{report['path']}: {report['what']}", *lines]))


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
    if why_no_file(source / ORIGIN_FILE) is None:
        metadata[ORIGIN_KEY] = read_text(source / ORIGIN_FILE)
    origin = origin_of(metadata)
    return {key: origin[key] for key in ("base_model", "prompts", "step") if key in origin}


def _tensors(path: Path, is_adapter: bool) -> Iterator[tuple[str, int, Tensor | None]]:
    """Each tensor's key and number of elements, and itself where these are numbers of floating point.

    BOFTError for a tensor that an adapter cannot have, or that no model has.
    """
    with opened(path) as file:
        for key in file.keys():
            dtype, shape = header_of(file, key)
            if is_adapter:
                require_floats(path, key, dtype, shape)
            elif len(shape) > _MOST_AXES:
                raise BOFTError(f"'{path}': tensor '{key}' has {len(shape)} axes, and {_MOST_AXES} are the most")
            size = math.prod(shape)
            readable = size > 0 and dtype in FLOATS + _EIGHT_BITS
            tensor = file.get_tensor(key) if readable else None
            yield key, size, tensor.float() if dtype in _EIGHT_BITS and readable else tensor


def _part(
    kind: str, place: str, path: Path, key: str, tensor: Tensor, layers: Mapping[str, Any]
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
    tensor = tensor.float()
    if not key.endswith((".boft_R", ".oft_blocks")):
        return component, None
    squares = tensor if tensor.dim() == 4 or kind != LYCORIS else tensor[None]  # LyCORIS's OFT has no axis of factors
    require_butterfly(tuple(squares.shape), f"'{path}': tensor '{key}'")
    return component, 0.5 * (squares - squares.mT) if key.endswith(".boft_R") else squares.mT - squares
