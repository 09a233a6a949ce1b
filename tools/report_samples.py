"""The videos of a report: samples beside the base model's, and the grid of a strength sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tools.report_charts import number
from tools.report_privacy import shown
from tools.report_runs import RunRecord, SweepEntry
from tools.report_tables import isolated
from tools.report_videos import Film, Packed
from wan.variants import VARIANTS

SMALL = 192  # pixels: smaller videos are drawn with sharp pixels, as they are enlarged


@dataclass(frozen=True)
class Shot:
    """What was rendered, and its videos with their captions, the base model's first."""

    prompt: str
    seed: int | None
    films: tuple[tuple[str, Film], ...]


def shots_of(records: Sequence[RunRecord]) -> list[Shot]:
    """Of one run the samples at all steps, of several the last ones of each beside each other."""
    shots: dict[tuple[str, int | None], list[tuple[str, Film]]] = {}
    for record in records:
        for index in range(max(map(len, record.samples.values()), default=0)):
            films = shots.setdefault(_prompt_and_seed(record, index), [])
            steps = [step for step, paths in record.samples.items() if index < len(paths)]
            if not films and index < len(record.compared):
                like = record.samples[steps[-1]][index]
                films.append(("base model", Film(record.compared[index], size_of=like)))
            if len(records) == 1:
                films += [(f"step {s:,}", Film(record.samples[s][index])) for s in steps]
            else:
                words = f"{record.name}, step {steps[-1]:,}"
                films.append((words, Film(record.samples[steps[-1]][index])))
    return [Shot(prompt, seed, tuple(films)) for (prompt, seed), films in shots.items()]


def films_by_importance(records: Sequence[RunRecord], shots: Sequence[Shot]) -> list[Film]:
    """The base's and the last samples first, then sweeps, then older samples."""
    last = [films.pop(0) for shot in shots if (films := [f for _, f in shot.films][:1])]
    older: list[Film] = []
    most = max((len(shot.films) for shot in shots), default=0)
    for back in range(1, most):
        films = [shot.films[-back][1] for shot in shots if back < len(shot.films)]
        (last if back == 1 or len(records) > 1 else older).extend(films)
    swept = [Film(entry.file) for record in records for entry in record.sweep]
    return [*last, *swept, *older]


def samples(
    records: Sequence[RunRecord], shots: Sequence[Shot], videos: Mapping[Film, Packed]
) -> str:
    """A row of videos for each prompt and seed, which play together."""
    rows = []
    for shot in shots:
        figures = [_figure(words, videos[film]) for words, film in shot.films if film in videos]
        if figures:
            seed = f"seed {shot.seed}" if shot.seed is not None else ""
            rows.append(_row(shot.prompt, seed, f'<div class="films">{"".join(figures)}</div>'))
    settings = _settings_line(records[0])
    return f'<p class="quiet">{escape(settings)}</p>{"".join(rows)}' if rows else ""


def sweep(record: RunRecord, videos: Mapping[Film, Packed]) -> str:
    """A grid for each prompt and seed: strength of high over strength of low."""
    grids: dict[tuple[str, int], list[SweepEntry]] = {}
    for entry in record.sweep:
        if Film(entry.file) in videos:
            grids.setdefault((entry.prompt, entry.seed), []).append(entry)
    return "".join(
        _row(prompt, f"seed {seed}", _grid(entries, videos))
        for (prompt, seed), entries in grids.items()
    )


def _grid(entries: Sequence[SweepEntry], videos: Mapping[Film, Packed]) -> str:
    """A table if most of its cells are there, else one after the other."""
    at = {(e.strengths.get("high"), e.strengths.get("low")): e for e in entries}
    highs = sorted({high for high, _ in at if high is not None})
    lows = sorted({low for _, low in at if low is not None})
    if 2 * len(at) < len(highs) * len(lows) or not highs or not lows:
        figures = "".join(_figure(_strengths(e), videos[Film(e.file)]) for e in entries)
        return f'<div class="films">{figures}</div>'
    head = "".join(f"<th>low {number(low)}</th>" for low in lows)
    rows = []
    for high in highs:
        cells = "".join(
            f"<td>{_video(videos[Film(at[high, low].file)]) if (high, low) in at else ''}</td>"
            for low in lows
        )
        rows.append(f"<tr><th>high {number(high)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="sweep"><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _strengths(entry: SweepEntry) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in entry.strengths.items())


def _row(prompt: str, words: str, body: str) -> str:
    return (
        f'<article class="shot"><h3 dir="auto">{isolated(shown(prompt))} '
        f'<small class="quiet">{escape(words)}</small></h3>{body}</article>'
    )


def _figure(words: str, video: Packed) -> str:
    kind = ' class="base"' if words == "base model" else ""
    return f"<figure{kind}>{_video(video)}<figcaption>{isolated(words)}</figcaption></figure>"


def _video(video: Packed) -> str:
    kind = ' class="small"' if min(video.width, video.height) < SMALL else ""
    return (
        f'<video{kind} muted loop playsinline controls preload="none" width="{video.width}" '
        f'height="{video.height}" src="data:video/mp4;base64,{video.text}"></video>'
    )


def _prompt_and_seed(record: RunRecord, index: int) -> tuple[str, int | None]:
    """Of the shot with this number: the prompts of the settings, each with all seeds."""
    prompts, seeds = (record.settings.get(f"preview.{key}") for key in ("prompts", "seeds"))
    if isinstance(prompts, list) and isinstance(seeds, list) and seeds:
        prompt, seed = divmod(index, len(seeds))
        if prompt < len(prompts) and isinstance(seeds[seed], int):
            return str(prompts[prompt]), seeds[seed]
    return f"sample {index}", None


def _settings_line(record: RunRecord) -> str:
    """How the samples were rendered: what is not set is the variant's."""
    facts = VARIANTS.get(str(record.settings.get("model.variant")))
    usual = (
        {}
        if facts is None
        else {
            "steps": facts.sample_steps,
            "shift": facts.sample_shift,
            "guidance_high": facts.guidance.high,
            "guidance_low": facts.guidance.low,
            "frames": facts.frames,
            "height": facts.height,
            "width": facts.width,
        }
    )
    words = []
    for key, value in usual.items():
        found = record.settings.get(f"preview.{key}")
        words.append(f"{key.replace('_', ' ')} {value if found is None else found}")
    return ", ".join(words)
