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
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Friendly, help="Vision-language models from exchangeable parts, trained by one YAML.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
data = typer.Typer(cls=_Friendly, help="Data: convert other formats, make the demo's scenes.", no_args_is_help=True)
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


@app.command("train")
def train_command(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    nproc: Annotated[int, typer.Option(help="Processes on this machine; more than one are started through torchrun.")] = 1,
) -> None:
    """Train all stages of a run. Example: vlm train llava_tiny data_root=/data"""
    if nproc > 1:
        from vlm.train.launch import torchrun

        raise typer.Exit(torchrun(nproc, sys.argv[1:]))
    import vlm

    vlm.fit(vlm.compose(config, *(overrides or [])), resume=resume)


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
    file: Annotated[Path | None, typer.Option(help="Another LLaVA-format file than the run's `eval` sources.")] = None,
    images: Annotated[Path | None, typer.Option(help="Root of that file's pictures.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions per source.")] = None,
) -> None:
    """Score a run on its held-out sources: accuracy per kind beside blind and chance. Example: vlm eval runs/demo"""
    import vlm

    vlm.evaluate(run, stage=stage, file=file, images=images, limit=limit)


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
    to: Annotated[str, typer.Option(help="The family whose classes load the result.")] = "llava",
    out: Annotated[Path | None, typer.Option(help="Where to; default RUN/export-FAMILY.")] = None,
) -> None:
    """Write a checkpoint that transformers' own classes load, and prove it in a fresh process. Example: vlm export runs/demo --to llava"""
    from vlm.weights.export import export_run

    report = export_run(run, out, to=to)
    typer.echo(f"{report.folder}: max logit difference {report.max_logit_difference:.2e} over {report.prompts} prompts, greedy tokens equal")


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
    run = vlm.fit(composed, resume=(Path(composed.runs) / composed.name / "config.yaml").is_file())
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
def scenes_command(folder: Path, seed: int = 0, count: int = 12000, held_out: int = 2000) -> None:
    """Make the demo's pictures, captions, questions and tokenizer."""
    from vlm.data.scenes import write_scenes

    typer.echo(write_scenes(folder, seed=seed, scenes=count, held_out=held_out))


@data.command("convert")
def convert_command(source: Path, out: Path, to: Annotated[str, typer.Option(help="The format to write.")] = "llava") -> None:
    """Parquet picture sets -> LLaVA JSON and picture files. Example: vlm data convert sets/digits_strips digits --to llava"""
    from vlm.data.convert import convert_parquet as write

    typer.echo(write(source, out, to=to))


@data.command("tokenizer")
def tokenizer_command(file: Path, out: Path, size: Annotated[int, typer.Option(help="Tokens, at most.")] = 512) -> None:
    """Make a small tokenizer of a LLaVA-format file's own text. Example: vlm data tokenizer digits/train.json digits/tokenizer"""
    from vlm.data.llava import LlavaSource
    from vlm.data.tokenizer import write_tokenizer

    length = write_tokenizer(out, (turn.text for sample in LlavaSource(file=str(file)).open() for turn in sample.turns), size)
    typer.echo(f"{out}: {length} tokens")
