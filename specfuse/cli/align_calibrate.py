"""``specfuse align calibrate``: how far a cosine may be trusted, measured on held-out clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specfuse.cli import UserError, load_head, model_directory, print_json
from specfuse.cli.train import default_cache, progress


def calibrate_adapter(
    adapter: Path | None,
    target: Path | None,
    drafter: Path | None,
    out: Path | None,
    clips: int,
    questions: int,
    nodes: int,
    png: Path | None,
    cache: Path | None,
    device: str,
    json: bool,
) -> None:
    """Writes calibration.json beside the adapter, or into ``out``, and prints how well it is calibrated."""
    if target is None or drafter is None:
        raise UserError("calibrate needs --target DIR and --drafter DIR")
    directory = out or adapter
    if directory is None:
        raise UserError("calibrate needs --adapter DIR, or --out DIR where states are compared as they are")
    if adapter is not None and out is not None and out.resolve() != adapter.resolve():
        raise UserError("--out must not be given with --adapter: the calibration belongs beside the adapter")
    import torch

    from specfuse.acceptance.reliability import write_reliability_picture
    from specfuse.adapters import load_adapter
    from specfuse.calibrate import calibrate
    from specfuse.models.checkpoint import load_video_llava

    made = None if adapter is None else load_adapter(adapter).to(device)
    model, processor = load_video_llava(model_directory(target), dtype=torch.float32, device=device)
    drafts = drafter_in(drafter, model, processor)
    with progress() as bars:
        found = calibrate(
            model,
            processor,
            drafts,
            made,
            cache or default_cache(),
            clips=clips,
            questions=questions,
            max_nodes=nodes,
            tell=bars,
        )
    directory.mkdir(parents=True, exist_ok=True)
    path = found.save(directory)
    if png is not None:
        write_reliability_picture(png, found.about["report"])
    if json:
        print_json(found.about | {"kind": found.kind})
    else:
        print("\n".join([*lines(found.kind, found.about), f"written: {path}"]))


def drafter_in(directory: Path, model: Any, processor: Any) -> Any:
    """The drafter that a directory holds, of a kind that gives states: head, EventGPT or draft model."""
    from specfuse.drafters import ModelDrafter, holds_head
    from specfuse.drafters.event import EventDrafter
    from specfuse.models.checkpoint import load_draft_model, load_eventgpt, read_config

    path = model_directory(directory)
    if holds_head(path):
        return load_head("--drafter", path, model)
    if read_config(path).get("model_type") == "eventgpt":
        return EventDrafter(*load_eventgpt(path, dtype=model.dtype, device=model.device), processor)
    return ModelDrafter(load_draft_model(path, dtype=model.dtype, device=model.device))


def lines(kind: str, about: dict[str, Any]) -> list[str]:
    """What a terminal is shown."""
    report = about["report"]
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in about["log_loss_left_out"].items())
    told = [
        f"fitted on {about['fitted_on']:,} places, checked on {report['places']:,} of {report['groups']} "
        f"other drives; the target agrees with {report['agreement']:.1%} of the drafts",
        f"log loss on clips left out: {losses}; kept: {kind}",
        f"calibration error {report['calibration_error']:.4f} (agreement dealt at random: "
        f"{report['control']:.4f})",
        "allowed disagreement: drafts let through, estimated and measured agreement",
    ]
    for row in report["bounds"]:
        if row["estimated"] is None:
            told.append(f"  {row['max_disagreement']:4.0%}: none")
        else:
            measured = f"{row['estimated']:6.1%} {row['measured']:6.1%}"
            told.append(f"  {row['max_disagreement']:4.0%}: {row['share']:6.1%} {measured}")
    told.append("cosine at least: share of places, same token")
    for row in report["by_cosine"]:
        agreement = "" if row["agreement"] is None else f" {row['agreement']:6.1%}"
        told.append(f"  {row['threshold']:4.2f}: {row['share']:6.1%}{agreement}")
    return told
