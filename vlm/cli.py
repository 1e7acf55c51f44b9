"""The command `vlm`: parses, calls, prints; no logic. Heavy imports stay inside the commands, so that help answers at once."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from vlm.errors import VLMError


class _Friendly(TyperGroup):
    """Errors that a user can cause are sentences, not tracebacks."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except VLMError as problem:
            typer.secho(f"{type(problem).__name__}: {problem}", fg="red", err=True)
            raise typer.Exit(problem.exit_code) from None


app = typer.Typer(
    cls=_Friendly, help="Vision-language models from exchangeable parts, trained by one YAML.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
data = typer.Typer(cls=_Friendly, help="Data: check them, convert them, draw the demo's scenes and small text.", no_args_is_help=True)
app.add_typer(data, name="data")


@app.callback()
def before(imports: Annotated[list[str] | None, typer.Option("--import", help="A module or FILE.py with parts of your own, for run folders that use them.")] = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars for files of any size
    if imports:
        from vlm.composition import import_parts

        import_parts(imports)


Config = Annotated[str, typer.Argument(help="A name of configs/run, or the path of a YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, such as data_root=/data stages.align.batch=64.")]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]
Splits = Annotated[str, typer.Argument(metavar="FILE", help="A file, a glob of the parts of a split, or a folder with a file or numbered parts per split.")]
Reader = Annotated[str | None, typer.Option(help="Default: told by the extension.")]
Images = Annotated[Path | None, typer.Option(help="Where paths of pictures start; default: beside the file.")]
Columns = Annotated[str | None, typer.Option(help="Of Parquet and Arrow, our names for the file's: '{image: picture, question: prompt, answer: response}'.")]


@app.command("train")
def train_command(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    nproc: Annotated[str, typer.Option(help="Processes on this machine, or auto: one per GPU. Several are started through torchrun.")] = "1",
    nodes: Annotated[int, typer.Option(min=1, help="Machines; the same command is started on each.")] = 1,
    node_rank: Annotated[int | None, typer.Option(help="Which of them this is, from 0; without it their addresses give the order.")] = None,
    rendezvous: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where several machines find each other: the first of them, and a free port.")] = None,
    print_only: Annotated[bool, typer.Option("--print-only", help="Only print the same start for torchrun, the DeepSpeed launcher and Slurm.")] = False,
) -> None:
    """Train all stages of a run. Example: vlm train llava_tiny data_root=/data"""
    import vlm
    from vlm.train.launch import start_ranks
    from vlm.train.rank import AGAIN, as_rank

    run = vlm.compose(config, *(overrides or []))
    code = start_ranks(sys.argv[1:], run.folder, nproc=nproc, nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, print_only=print_only)
    if code is not None:
        raise typer.Exit(code)
    try:
        with as_rank(run.folder):
            vlm.fit(run, resume=resume)
    except KeyboardInterrupt:
        typer.secho(f"interrupted; {AGAIN}", err=True)
        raise typer.Exit(130) from None


@app.command("check")
def check_command(
    config: Config, overrides: Overrides = None, everything: Annotated[bool, typer.Option("--all", help="Open every picture's header, not the first 1,000.")] = False
) -> None:
    """Say what a run would do and what is wrong with it; no GPU, no weights. Example: vlm check llava_1.5_7b"""
    import vlm

    report = vlm.check(vlm.compose(config, *(overrides or [])), everything=everything)
    report.print()
    raise typer.Exit(0 if report.ok else 1)


@app.command("eval")
def eval_command(
    run: Run,
    stage: Annotated[str | None, typer.Option(help="A stage's model instead of the export.")] = None,
    file: Annotated[Path | None, typer.Option(help="Other questions than the run's `eval` sources: a file of any format, or a folder or glob of one split.")] = None,
    images: Annotated[Path | None, typer.Option(help="Root of that file's pictures.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many samples per source, spread evenly; replaces the scores of the whole source.")] = None,
) -> None:
    """Score a run on its held-out sources: accuracy per kind beside blind and chance. Example: vlm eval runs/demo"""
    import vlm

    vlm.evaluate(run, stage=stage, file=file, images=images, limit=limit)


@app.command("report")
def report_command(run: Run) -> None:
    """Write RUN/report.html, a page that needs no network: curves, answers, accuracy, data, speed. `vlm train` does it at its end; again after `vlm eval`. Example: vlm report runs/demo"""
    import vlm

    typer.echo(vlm.report(run))


@app.command("replay")
def replay_command(
    run: Run,
    step: Annotated[int, typer.Option(help="Which: `total` of metrics.jsonl; with --stage the stage's own.")],
    stage: Annotated[str | None, typer.Option(help="Count the steps of this stage.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the samples as text, the pictures as the encoder saw them, and everything as JSON.")] = None,
) -> None:
    """Do a step of a run again and say what each of its samples lost; the exit code is 1 where the loss is not what it was. Example: vlm replay runs/demo --step 120"""
    from vlm.train.replay import replay_step

    done = replay_step(run, step, stage=stage, out=out)
    done.print()
    raise typer.Exit(0 if done.exact else 1)


@app.command("chat")
def chat_command(
    run: Run,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; several are allowed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One question; without it a conversation begins.")] = None,
) -> None:
    """Talk to a run's model. Example: vlm chat runs/demo --image cat.png"""
    import torch

    from vlm.chat import converse
    from vlm.loading import load

    model, processor = load(run)
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    converse(model, processor, images=image or [], prompt=prompt)


@app.command("export")
def export_command(
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            help="llava, deepseek_vl, deepseek_vl_hybrid: transformers' classes; deepseek_vl_official, arcana: the keys of their own programs; peft: LoRA and MM-LoRA alone."
        ),
    ] = "llava",
    out: Annotated[Path | None, typer.Option(help="Where to; default RUN/export-FAMILY.")] = None,
) -> None:
    """Write a checkpoint that programs of others load, and prove it by loading it; LoRA is merged. Example: vlm export runs/demo --to llava"""
    if to == "peft":
        from vlm.weights.adapter import export_adapters

        typer.echo("\n".join(export_adapters(run, out)))
        return
    from vlm.weights.export import export_run

    report = export_run(run, out, to=to)
    for line in filter(None, (report.merged, report.changed)):
        typer.echo(line)
    typer.echo(f"{report.folder}: max logit difference {report.max_logit_difference:.2e} over {report.prompts} prompts, greedy tokens equal")


@app.command("ablate")
def ablate_command(
    config: Config,
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE,VALUE,... in YAML; several options make a grid. The first values are what the others are compared with.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many, from the configuration's own on.")] = 3,
    out: Annotated[Path | None, typer.Option(help="The folder of all runs; default RUNS/NAME-ablation.")] = None,
) -> None:
    """Train and score a grid of settings with several seeds, one after another; differences seed by seed. Goes on where it stopped.
    Example: vlm ablate demo data_root=demo_data --vary model.connector.depth=1,2 --seeds 3"""
    import vlm
    from vlm.train.ablate import run_ablation

    found = run_ablation(config, overrides or [], vary or [], seeds=seeds, evaluate=vlm.evaluate, out=out)
    found.print()
    raise typer.Exit(1 if found.failed else 0)


@app.command("doctor")
def doctor_command(
    runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"), as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False
) -> None:
    """Versions, devices, and what is known to keep a run from working here; exit code 1 if anything does. Example: vlm doctor"""
    import json

    from vlm.doctor import examine

    diagnosis = examine(runs)
    if as_json:
        typer.echo(json.dumps(diagnosis.plain(), indent=1))
    else:
        diagnosis.print()
    raise typer.Exit(0 if diagnosis.ok else 1)


@app.command("import")
def import_command(
    path: Annotated[str, typer.Argument(help="A folder, or a hub repository whose snapshot is in the local cache.")],
    family: Annotated[str, typer.Option(help="What it is.")] = "llava",
    out: Annotated[Path | None, typer.Option(help="Where to; default NAME-vlm.")] = None,
    tower: Annotated[str | None, typer.Option(help="A folder with the vision tower, or with its numbers, where PATH has none.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="A folder with the tokenizer, where PATH has none.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Another prompt than the checkpoint's own.")] = None,
) -> None:
    """Write a model of others as a folder that chat, export and train open. Example: vlm import llava-1.5-7b-hf --family llava"""
    from vlm.weights.imports import import_model

    report = import_model(path, out, family, tower=tower, tokenizer=tokenizer, prompt=prompt)
    typer.echo(f"{report.folder}: {report.parts}, {report.dtype}, prompt {report.prompt}, pictures {report.images}")
    for note in report.notes:
        typer.echo(f"  {note}")


@app.command("merge")
def merge_command(
    run: Run,
    out: Annotated[Path | None, typer.Option(help="Where to; default RUN/merged, or RUN/merged-text.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="The decoder alone, as a text model of transformers; of MM-LoRA its language side.")] = False,
) -> None:
    """Compute a run's LoRA into its weights; the result loads like any other folder. Example: vlm merge runs/demo"""
    from vlm.weights.merge import merge_run, merge_text

    folder, merged = (merge_text if text_only else merge_run)(run, out)
    typer.echo(f"{folder}: {merged}")


@app.command("list")
def list_command() -> None:
    """All parts and configurations."""
    from vlm.train.parts import parts_table

    parts_table().print()


@app.command("demo")
def demo_command(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Of the scenes, the first values and the order; each has a run of its own.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where the scenes go; default demo_data, demo_data-SEED.")] = None,
) -> None:
    """The whole way on a laptop: make scenes, train two stages, evaluate, ask about a held-out picture, export. Goes on where it stopped. Example: vlm demo"""
    import vlm
    from vlm.chat import converse
    from vlm.data.scenes import write_scenes
    from vlm.weights.export import export_run

    folder = folder or Path(f"demo_data-{seed}" if seed else "demo_data")
    if not (folder / "heldout.json").is_file():
        typer.echo(f"drawing scenes into {folder}")
        write_scenes(folder, seed=seed)
    composed = vlm.compose("demo", f"data_root={folder}", f"seed={seed}", f"name={f'demo-{seed}' if seed else 'demo'}", *(overrides or []))
    run = vlm.fit(composed, resume=(composed.folder / "config.yaml").is_file())
    vlm.evaluate(run)
    model, processor = vlm.load(run)
    sample = vlm.compose("demo", f"data_root={folder}").data["heldout"].open()[0]
    question = sample.turns[0].text.strip()
    typer.echo(f"\n{sample.pictures[0].path}\n> {question}")
    converse(model, processor, images=[sample.pictures[0]], prompt=question)
    report = export_run(run)
    typer.echo(
        f"\n{report.folder}: loaded by transformers' LlavaForConditionalGeneration in a fresh process, max logit difference {report.max_logit_difference:.2e}, greedy tokens equal"
    )


@data.command("scenes")
def scenes_command(
    folder: Path, seed: int = 0, count: int = 12000, held_out: int = 2000, to: Annotated[str, typer.Option(help="llava: JSON and picture files; or tar shards.")] = "llava"
) -> None:
    """Make the demo's pictures, captions, questions and tokenizer."""
    from vlm.data.scenes import write_scenes

    typer.echo(write_scenes(folder, to=to, seed=seed, scenes=count, held_out=held_out))


@data.command("smalltext")
def smalltext_command(folder: Path, seed: int = 0, count: int = 4000, held_out: int = 300) -> None:
    """Make pages of small digits, questions and a tokenizer: text that a low-resolution tower cannot read."""
    from vlm.data.smalltext import write_smalltext

    typer.echo(write_smalltext(folder, seed=seed, pages=count, held_out=held_out))


@data.command("check")
def data_check_command(
    source: Splits,
    reader: Reader = None,
    images: Images = None,
    columns: Columns = None,
    everything: Annotated[bool, typer.Option("--all", help="Read every picture's header, not the first 1,000.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture whole, as training does: files cut behind their header are found.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write the report to this file too.")] = None,
) -> None:
    """Say what data hold and what is wrong with them; the exit code is 1 where something is. Example: vlm data check digits/train.json"""
    from vlm.data.sources import columns_of, sources_at
    from vlm.data.survey import survey_source, write_report
    from vlm.folders import check_place

    if json is not None:
        check_place(json.parent)
    sources = sources_at(source, reader=reader, images=images, columns=columns_of(columns))
    surveys = {split: survey_source(spec, everything=everything, decode=decode) for split, spec in sources.items()}
    for found in surveys.values():
        found.print()
    if json is not None:
        write_report(json, surveys)
    raise typer.Exit(0 if all(found.ok for found in surveys.values()) else 1)


@data.command("convert")
def convert_command(
    source: Splits,
    out: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    to: Annotated[str, typer.Option(help="llava, messages, sharegpt, parquet or tar.")] = "llava",
    reader: Reader = None,
    images: Images = None,
    columns: Columns = None,
    group: Annotated[bool, typer.Option(help="Of Parquet sets with an image_id: all training questions about a picture become one sample.")] = True,
    per_shard: Annotated[int, typer.Option(help="Samples per tar shard.")] = 1000,
) -> None:
    """Turn data of any format into another; pictures keep their bytes. Example: vlm data convert sets/digits_strips digits --to tar"""
    from vlm.data.convert import convert_data
    from vlm.data.sources import columns_of

    done = convert_data(source, out, to, reader=reader, images=images, columns=columns_of(columns), group=group, per_shard=per_shard)
    for split, written in done.items():
        for warning in written.warnings:
            typer.secho(f"{split}: {warning}", fg="yellow", err=True)
        counted = f"{split}: {written.samples:,} samples, {written.answers:,} answers, {written.pictures:,} pictures"
        typer.echo(f'{counted}; {{reader: {written.reader}, file: "{out / written.file}", images: "{out}"}}')


@data.command("tokenizer")
def tokenizer_command(
    source: Annotated[str, typer.Argument(help="A file, a glob of the parts of a split, or a folder; all its splits are read.")],
    out: Path,
    columns: Columns = None,
    size: Annotated[int, typer.Option(help="Tokens, at most.")] = 512,
) -> None:
    """Make a small tokenizer of data's own text. Example: vlm data tokenizer digits/train.json digits/tokenizer"""
    from vlm.data.sources import columns_of, sources_at
    from vlm.data.tokenizer import write_tokenizer

    readers = [spec.open() for spec in sources_at(source, columns=columns_of(columns)).values()]
    length = write_tokenizer(out, (turn.text for reader in readers for index in range(len(reader)) for turn in reader[index].turns), size)
    typer.echo(f"{out}: {length} tokens")
