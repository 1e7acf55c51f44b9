"""The command `vlm`: parses, calls, prints; no logic. Heavy imports stay inside the commands, so that help answers at once."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm.errors import VLMError


class _Friendly(typer.core.TyperGroup):
    """Errors that a user can cause are sentences, not tracebacks."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except VLMError as problem:
            typer.secho(f"{type(problem).__name__}: {problem}", fg="red", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_Friendly, help="Vision-language models from exchangeable parts, trained by one YAML.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
data = typer.Typer(cls=_Friendly, help="Data: convert other formats, make the demo's scenes.", no_args_is_help=True)
app.add_typer(data, name="data")

Config = Annotated[str, typer.Argument(help="A name of configs/run, or the path of a YAML.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, such as data_root=/data stages.align.batch=64.")]
Run = Annotated[Path, typer.Argument(help="A run's folder.")]


@app.command()
def train(
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


@app.command()
def check(config: Config, overrides: Overrides = None, everything: Annotated[bool, typer.Option("--all", help="Open every picture's header, not the first 1,000.")] = False) -> None:
    """Say what a run would do and what is wrong with it; no GPU, no weights. Example: vlm check llava_1.5_7b"""
    import vlm

    report = vlm.check(vlm.compose(config, *(overrides or [])), everything=everything)
    report.print()
    raise typer.Exit(0 if report.ok else 1)


@app.command("eval")
def evaluate(
    run: Run,
    stage: Annotated[str | None, typer.Option(help="A stage's model instead of the export.")] = None,
    file: Annotated[Path | None, typer.Option(help="Another LLaVA-format file than the run's `eval` sources.")] = None,
    images: Annotated[Path | None, typer.Option(help="Root of that file's pictures.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many questions per source.")] = None,
) -> None:
    """Score a run on its held-out sources: accuracy per kind beside blind and chance. Example: vlm eval runs/demo"""
    import vlm

    vlm.evaluate(run, stage=stage, file=file, images=images, limit=limit)


@app.command()
def chat(
    run: Run,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; several are allowed.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One question; without it a conversation begins.")] = None,
) -> None:
    """Talk to a run's model. Example: vlm chat runs/demo --image cat.png"""
    from vlm.chat import chat as talk
    from vlm.loading import load

    model, processor = load(run)
    talk(model, processor, images=image or [], prompt=prompt)


@app.command()
def export(
    run: Run,
    to: Annotated[str, typer.Option(help="The family whose classes load the result.")] = "llava",
    out: Annotated[Path | None, typer.Option(help="Where to; default RUN/export-FAMILY.")] = None,
) -> None:
    """Write a checkpoint that transformers' own classes load, and prove it in a fresh process. Example: vlm export runs/demo --to llava"""
    from vlm.weights.export import export as write

    report = write(run, out or run / f"export-{to}", to=to)
    typer.echo(f"{report.folder}: max logit difference {report.max_logit_difference:.2e} over {report.prompts} prompts, greedy tokens equal")


@app.command("list")
def list_parts() -> None:
    """All parts and configurations."""
    from vlm.train.check import parts_table

    parts_table().print()


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the scenes go.")] = Path("demo_data"),
    seed: int = 0,
    name: str = "demo",
    overrides: Overrides = None,
) -> None:
    """The whole way on a laptop: make scenes, train two stages, evaluate, chat, export."""
    from vlm.train.demo import run_demo

    run_demo(folder, seed, name, overrides or [])


@data.command("scenes")
def scenes(folder: Path, seed: int = 0, count: int = 12000, held_out: int = 2000) -> None:
    """Make the demo's pictures, captions, questions and tokenizer."""
    from vlm.data.scenes import write_scenes

    typer.echo(write_scenes(folder, seed=seed, scenes=count, held_out=held_out))


@data.command("convert")
def convert(source: Path, out: Path, to: Annotated[str, typer.Option(help="The format to write.")] = "llava") -> None:
    """Parquet picture sets -> LLaVA JSON and picture files. Example: vlm data convert sets/digits_strips digits --to llava"""
    from vlm.data.convert import convert_parquet as write

    typer.echo(write(source, out, to=to))
