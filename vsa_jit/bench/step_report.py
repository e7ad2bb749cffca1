"""What the steps of a model took, for people (a table) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from vsa_jit.bench import report
from vsa_jit.bench.attention import SDPA_NAMES
from vsa_jit.bench.cases import format_size
from vsa_jit.bench.steps import MODELS, STEPS, Plan, StepCheck, StepRow
from vsa_jit.text import counted

NOTES = """\
ms: a whole step; inference is the transformer's forward, training its forward and backward with checkpointing.
speed-up: over the dense model in the same step and mode. of limit: the same, as a share of what the model reaches
whose self-attention is left out, and nothing else. MiB: peak memory above weights and inputs, gradients included.
dense, left out: with diffusers' own processor. The others have that of enable_vsa, whose rotary embedding is faster in
eager mode, so that one of them can pass the limit; its dense row shows by how much."""
COLUMNS = ("step", "mode", "self-attention", "ms", "speed-up", "of limit", "MiB")


def print_table(
    plan: Plan, sdpa: dict[str, Any], checks: Sequence[StepCheck], rows: Sequence[StepRow], file: TextIO
) -> None:
    gate = "with gates" if plan.gate else "without gates"
    print(
        f"model: {MODELS[plan.model].about}, {counted(plan.layers, 'layer')}, {format_size(plan.grid)} tokens, "
        f"batch {plan.batch}, {plan.dtype}, random weights, {gate}",
        file=file,
    )
    print("dense attention:", ", ".join(f"{SDPA_NAMES[name]} ({STEPS[key]})" for key, name in sdpa.items()), file=file)
    for check in checks:
        print(
            f"check of {check.block_size}, {check.step}, {check.mode}: {'ok' if check.ok else report.FAILED}, "
            f"with all blocks selected {check.error:.2e} from dense, bound {check.bound:.2e}",
            file=file,
        )
    if rows:
        print(file=file)
        report.print_table(COLUMNS, [_cells(row) for row in rows], file)
        print(f"\n{NOTES}", file=file)


def _cells(row: StepRow) -> list[str]:
    numbers = [f"{row.ms:.1f}", f"{row.speedup:.2f}x", f"{row.share_of_limit:.2f}", report.memory(row.peak_mib)]
    return [row.step, row.mode, row.attention, *numbers]


def write_json(
    environment: dict[str, Any],
    plan: Plan,
    sdpa: dict[str, Any],
    checks: Sequence[StepCheck],
    rows: Sequence[StepRow],
    file: TextIO,
) -> None:
    content = {
        "environment": environment,
        "model": plan.model,
        "layers": plan.layers,
        "grid": format_size(plan.grid),
        "batch": plan.batch,
        "dtype": plan.dtype,
        "gate": plan.gate,
        "backend": plan.backend,
        "dense_by": {STEPS[key]: SDPA_NAMES[name] for key, name in sdpa.items()},
        "checks": [asdict(check) for check in checks],
        "rows": [asdict(row) for row in rows],
    }
    json.dump(content, file, indent=2)
    file.write("\n")
