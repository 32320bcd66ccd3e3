"""The texts of the benchmark page: rows of its table, the gallery, how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cnnedge.report.style import (
    NONE,
    Look,
    Row,
    at,
    flat,
    listed,
    ms,
    number,
    percent,
    signed,
    title_of,
)


def rows(model: Row, looks: Mapping[str, Look]) -> list[dict[str, Any]]:
    """Return one row of texts for each contestant, in the document's order."""
    doubted = bool(model.get("doubt"))
    pick = None if doubted else at(model, "pick", "name")
    return [
        {
            "name": c["name"],
            "title": title_of(c),
            "provider": c.get("provider") or "",
            "glyph": looks[c["name"]].glyph,
            "colour": looks[c["name"]].colour,
            "pick": c["name"] == pick,
            "baseline": c["name"] == model.get("baseline"),
            "size": NONE if c.get("bytes") is None else f"{number(c['bytes'] / 1e6)} MB",
            **_accuracy(c, model),
            **{p: ms(at(c, "single_stream", f"{p}_ms")) for p in ("p50", "p90", "p99")},
            **_ratio(c, model.get("baseline"), doubted),
            "roofline": percent(at(c, "roofline", "fraction")),
            "memory": _memory(at(c, "memory", "peak_mib")),
            "unstable": at(c, "single_stream", "stable") is False,
        }
        for c in model["contestants"]
    ]


def top1(contestant: Row, contestants: Iterable[Row]) -> float | None:
    """Return a contestant's top-1 in percent; the Keras graph's stands in the others' records."""
    found = at(contestant, "accuracy", "top1")
    if found is None and contestant.get("runtime") == "keras":
        known = (at(c, "accuracy", "reference_top1") for c in contestants)
        found = next((x for x in known if x is not None), None)
    return None if found is None else 100 * found


def points(x: float | None) -> str:
    """Write a number of points of top-1."""
    return "" if x is None else f"{x:g} point{'s' * (x != 1)}"


def notes(model: Row) -> list[tuple[str, str]]:
    """Return what has to be said of single contestants, each with its title."""
    found: dict[str, list[str]] = {}  # the same note of several contestants is printed once
    for c in model["contestants"]:
        said = _texts(at(c, "single_stream", "notes"))
        if at(c, "single_stream", "stable") is False:
            said = ["unstable: " + (", ".join(said) or "its medians had not settled")]
        said += [f"failed: {why}" for why in _texts(c.get("error"))]
        said += [f"accuracy: {note}" for note in _texts(c.get("accuracy_note"))]
        said += _texts(at(c, "sustained", "notes")) + _texts(c.get("notes"))
        if at(c, "roofline", "fraction") is None:
            said += [f"no share of the roofline: {why}" for why in _texts(at(c, "roofline", "why"))]
        for text in said:
            found.setdefault(text, []).append(title_of(c))
    everybody = [title_of(c) for c in model["contestants"]]
    told = [(_who(titles, everybody), text) for text, titles in found.items()]
    return sorted(told, key=lambda note: not note[1].startswith(("failed", "unstable")))


def _who(titles: Sequence[str], everybody: Sequence[str]) -> str:
    others = [title for title in everybody if title not in titles]
    if len(everybody) > 1 and not others:
        return "All"
    if len(others) < 3 < len(titles):
        return f"All but {listed(others)}"
    return listed(titles)


def left_out(model: Row) -> list[tuple[str, str]]:
    """Return who could not be measured, and why."""
    found = model.get("left_out") or []
    if isinstance(found, Mapping):
        return [(str(name), str(why)) for name, why in found.items()]
    return [
        (title_of(x), str(x.get("reason") or x.get("why") or "no reason was given"))
        if isinstance(x, Mapping)
        else (str(x), "no reason was given")
        for x in found
    ]


def gpu_figures(model: Row) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the heads and the rows of the table of a GPU's own times."""
    timed = [(c, gpu) for c in model["contestants"] if (gpu := at(c, "single_stream", "gpu"))]
    heads = list(dict.fromkeys(head for _, gpu in timed for head in gpu))
    return heads, [(title_of(c), [number(gpu.get(head)) for head in heads]) for c, gpu in timed]


def flips(contestant: Row, model: Row) -> list[dict[str, Any]]:
    """Return the images whose first answer is not the reference's, ready to be shown."""
    labels = model.get("labels") or []
    found = []
    for flip in contestant.get("flips") or []:
        truth = _of_image(at(model, "examples", "truth"), flip.get("image"))
        if isinstance(truth, int):
            truth = labels[truth] if 0 <= truth < len(labels) else truth
        thumbnail = str(_of_image(at(model, "examples", "thumbnails"), flip.get("image")) or "")
        answers = [
            {
                "who": who,
                "label": str(flip.get(key)),
                "probability": percent(flip.get(chance)),
                "right": None if truth is None else str(flip.get(key)) == str(truth),
            }
            for who, key, chance in (
                ("reference", "reference", "reference_probability"),
                ("variant", "answer", "probability"),
            )
        ]
        found.append(
            {
                "thumbnail": thumbnail if thumbnail.startswith("data:image/") else "",
                "image": flip.get("image"),
                "truth": truth,
                "answers": answers,
            }
        )
    return found


def about_model(model: Row) -> list[tuple[str, str]]:
    """Return what a model is and what it was measured on, as terms and texts."""
    image, data = model.get("image") or {}, model.get("data") or {}
    size = f"{image.get('width')}×{image.get('height')}" if at(image, "width") else ""
    resize = f", files resized by “{image['resize']}”" if at(image, "resize") else ""
    macs = model.get("macs")
    found = [
        ("Input", f"{model.get('layout') or ''}{resize}" or size),
        ("Weights", model.get("weights")),
        ("Multiplications", f"{number(macs / 1e6)} million for one image" if macs else None),
        ("Accuracy budget", points(model.get("max_drop"))),
    ]
    if data:
        where = f"{data.get('images') or 0:,} images of “{data.get('source')}”"
        where += f", sha256 {str(data['sha256'])[:16]}…" if data.get("sha256") else ""
        found += [("Accuracy on", where), ("Reference", data.get("reference"))]
    return [(term, str(text)) for term, text in found if text]


def environment_line(document: Row) -> str:
    """Return where and when it was measured, in one line."""
    environment = document.get("environment") or {}
    machine, conditions = environment.get("machine") or {}, environment.get("conditions") or {}
    threads = environment.get("threads")
    parts = [
        machine.get("cpu"),
        _with_unit(machine.get("cores"), "cores"),
        f"limited to {conditions['cpu_limit']:g} cores" if conditions.get("cpu_limit") else None,
        f"on {conditions['virtual']}" if conditions.get("virtual") else None,
        _plainly(environment.get("gpu")),
        f"{threads} thread{'s' * (threads != 1)} a call" if threads else None,
        _moment(document.get("created")),
    ]
    if (conditions.get("steal") or 0) > 0.01:
        parts.append(f"other guests took {percent(conditions['steal'])} of the CPUs")
    return " · ".join(str(part) for part in parts if part)


def about_run(document: Row) -> list[tuple[str, str]]:
    """Return how and where it was measured, as terms and texts."""
    environment = document.get("environment") or {}
    machine, conditions = environment.get("machine") or {}, environment.get("conditions") or {}
    steal = conditions.get("steal")
    told = {
        "governor": conditions.get("governor"),
        "clock": _with_unit(conditions.get("clock_mhz"), "MHz"),
        "virtual machine": conditions.get("virtual"),
        "container's limit": _with_unit(conditions.get("cpu_limit"), "cores"),
        "load": _plainly(conditions.get("load")),
        "CPUs that others took": _plainly(conditions.get("others")),
        "taken by other guests of the host": None if steal is None else percent(steal, 1),
    }
    unknown = [name for name, text in told.items() if not text]
    known = "; ".join(f"{name}: {text}" for name, text in told.items() if text)
    found = [
        ("Machine", _machine(machine)),
        ("GPU", _plainly(environment.get("gpu"))),
        ("A latency is of", environment.get("timed")),
        ("Threads of a call", environment.get("threads")),
        ("Conditions", known),
        ("Could not be read", ", ".join(unknown) if conditions else None),
        *(
            (f"Peak, {name.upper() if name[-1].isdigit() else name}", _peak(peak))
            for name, peak in (document.get("peaks") or {}).items()
        ),
        ("Asked for", _plainly(document.get("suite"))),
        ("Versions", _plainly(environment.get("tools"), ": ", " ")),
        ("Measured", _moment(document.get("created"))),
    ]
    return [(term, str(text)) for term, text in found if text]


def _accuracy(contestant: Row, model: Row) -> dict[str, str]:
    found, most = top1(contestant, model["contestants"]), model.get("max_drop")
    drop = at(contestant, "accuracy", "drop_points")
    between = at(contestant, "accuracy", "drop_interval_points")
    texts = {"top1": NONE if found is None else f"{found:.2f} %", "drop": NONE}
    texts |= {"drop_between": "", "status": ""}
    if drop is not None and contestant.get("runtime") != "keras":
        texts["drop"] = signed(drop)
        texts["drop_between"] = f"[{signed(between[0])}, {signed(between[1])}]" if between else ""
        if most is not None and drop > most:
            texts["status"] = "over budget"
        elif most is not None and (not between or between[1] > most):
            texts["status"] = "unproven"
    return texts


def _ratio(contestant: Row, baseline: Any, doubted: bool) -> dict[str, Any]:
    """Return a ratio's texts; one that a headline may bear is told from chance."""
    ratio = at(contestant, "single_stream", "against", "ratio")
    nothing = {"ratio_between": "", "headline": False}
    if contestant["name"] == baseline:
        return {"ratio": "1×", **nothing}
    if ratio is None:
        return {"ratio": NONE, **nothing}
    interval = at(contestant, "single_stream", "against", "interval")
    between = f"[{number(interval[0], 2)}, {number(interval[1], 2)}]" if interval else ""
    chance = bool(interval) and interval[0] <= 1.0 <= interval[1]
    factor = NONE if doubted else f"{number(ratio, 2)}×"
    return {"ratio": factor, "ratio_between": between, "headline": not doubted and not chance}


def _of_image(kept: Any, image: Any) -> Any:
    """Look an image up by its place: keys are text once they have been through JSON."""
    if not isinstance(kept, Mapping):
        return None
    return kept.get(str(image), kept.get(image))


def _moment(created: Any) -> str | None:
    """Write an ISO 8601 time, which is UTC, without what a reader does not need."""
    return f"{str(created)[:16].replace('T', ' ')} UTC" if created else None


def _machine(machine: Row) -> str:
    parts = [
        machine.get("cpu"),
        _with_unit(machine.get("cores"), "cores"),
        f"{machine['memory_gib']:g} GiB" if machine.get("memory_gib") else None,
        machine.get("system"),
        _plainly(machine.get("isa")),
    ]
    return "; ".join(str(part) for part in parts if part)


def _peak(peak: Any) -> str | None:
    if not isinstance(peak, Mapping):
        return None
    if peak.get("giga_per_second"):
        text = f"{number(peak['giga_per_second'])} billion multiplications and additions a second"
    elif peak.get("gigabytes_per_second"):
        text = f"{number(peak['gigabytes_per_second'])} GB/s"
    else:
        return _plainly(peak.get("why"))
    text += f", by {peak['by']}" if peak.get("by") else ""
    size = peak.get("size")
    size = " × ".join(map(str, size)) if isinstance(size, (list, tuple)) else _plainly(size)
    size += " MiB" if peak.get("gigabytes_per_second") and size.isdigit() else ""
    text += f", size {size}" if size else ""
    samples = flat(peak.get("samples"))
    if len(samples) > 1:
        text += f"; {len(samples)} rounds: {number(min(samples))} to {number(max(samples))}"
    return text


def _memory(mib: float | None) -> str:
    return NONE if mib is None else f"{mib:,.0f} MiB"


def _with_unit(x: Any, unit: str) -> str:
    if x is None:
        return ""
    if not isinstance(x, (int, float, list, tuple)):
        return f"{_plainly(x)} {unit}"
    shown = [number(v, 4) if v % 1 else f"{v:,.0f}" for v in flat(x)]
    return f"{' to '.join(dict.fromkeys([shown[0], shown[-1]]))} {unit}" if shown else ""


def _texts(found: Any) -> list[str]:
    """Return the texts in a note, a list of notes, notes by what is missing, or nothing."""
    if isinstance(found, Mapping):
        return [f"no {what}: {why}" for what, why in found.items()]
    if isinstance(found, (list, tuple)):
        return [str(text) for text in found if text]
    return [str(found)] if found else []


def _plainly(found: Any, between: str = "; ", after: str = ": ") -> str:
    """Write nested data as prose would."""
    if found is None:
        return ""
    if isinstance(found, Mapping):
        kept: Sequence[tuple[Any, Any]] = [(k, v) for k, v in found.items() if v not in (None, [])]
        words = [(str(k).replace("_", " "), _plainly(v)) for k, v in kept]
        return (", " if between == ": " else between).join(f"{k}{after}{v}" for k, v in words)
    if isinstance(found, (list, tuple)):
        return ", ".join(_plainly(part) for part in found)
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:g}" if isinstance(found, float) else str(found)
