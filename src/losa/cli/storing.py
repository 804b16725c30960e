"""The verbs of `losa` that store a result smaller: `round`, `pack`, `unpack`. `losa.cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from losa.cli.options import Output, Overwrite, Request, Trust, requests
from losa.cli.terminal import heavy, out, quiet, say

FEW_ZEROS = 0.2  # below, what they save hardly pays for the masks


@requests("values", "data", "calibration", "eval_data", "windows", "device", layers=())
def round_(
    directory: Annotated[
        Path, typer.Argument(help="Directory of a sparse checkpoint that `losa run`, `prune` or `compare` made.")
    ],
    output: Output,
    request: Request,
    overwrite: Overwrite = False,
) -> None:
    """Round the surviving weights of a finished run, as `losa run --values` does at its end, without running it again.

    The weights to the right of a rounded one make up for its error, on the texts of the run unless others are given.
    `losa pack --values` with the same name then loses nothing, where it would round every weight by itself.

    Example: `losa round smol-sparse --values int4 -o smol-int4`
    """
    from losa.cli.tables import summary
    from losa.commands.round import round_result

    heavy()
    out.print(summary(round_result(directory, output, request.overrides, overwrite)))
    say(f"saved and verified: {output}")


def pack(
    directory: Annotated[Path, typer.Argument(help="Directory of a sparse checkpoint.")],
    packed: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or see --overwrite.")],
    values: Annotated[
        str | None,
        typer.Option(
            help="`bfloat16` keeps every weight; `int8` and `int4` round them, with scales of rows or groups. By default what "
            "`--values` of run, prune or round was, which loses nothing then, or bfloat16."
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="The output head: `int8`, `int4`, or `keep` it dense. By default int8 where values are rounded."),
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            help="`int8` with rounded values: a CPU with AVX-512 decodes faster, with activations rounded to 8 bits for each 64 "
            "columns, as other engines round them. Prompts and other machines stay exact."
        ),
    ] = "bfloat16",
    trust_remote_code: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """Store a sparse checkpoint small: one bit for every weight, one number for every weight that is not zero.

    At 70 % zeros that is 0.36 of the dense linear layers (0.21 with int8 values, 0.15 with int4). `losa.load`, `losa generate`,
    `losa eval` and, after `import losa`, transformers run it packed; `losa unpack` gives the checkpoint back.
    """
    from losa.report.content import size
    from losa.runtime.files import pack_checkpoint

    quiet()
    done = pack_checkpoint(directory, packed, values, bool(trust_remote_code), head, overwrite, activations)
    say(
        f"packed {done['layers']} layers, {done['sparsity']:.2%} zeros: "
        f"{size(done['dense_bytes'])} -> {size(done['packed_bytes'])}, {done['ratio']:.3f} of dense"
    )
    if done["sparsity"] < FEW_ZEROS:
        say("the checkpoint has hardly any zeros, which is what makes it small and fast: losa run makes them")
    if done["values"] != "bfloat16":
        kept = "no weight changed: the checkpoint was on this grid already" if done["lossless"] else "weights were rounded"
        better = f"; losa round --values {done['values']} first has other weights make up for that"
        hint = better if done["roundable"] and not done["lossless"] else ""
        say(f"{done['values']}: {kept}{hint}")
    if done["head_bytes"]:
        say(f"and the output head in {done['head']}: {size(done['head_bytes'])}")
    say(f"saved and verified: {packed}")


def unpack(
    packed: Annotated[Path, typer.Argument(help="Directory of a packed checkpoint.")],
    directory: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or see --overwrite.")],
    trust_remote_code: Trust = None,
    overwrite: Overwrite = False,
) -> None:
    """The dense checkpoint of a packed one, with its zeros; bit for bit what was packed, for bfloat16 values."""
    from losa.runtime.files import unpack_checkpoint

    quiet()
    say(f"unpacked {unpack_checkpoint(packed, directory, bool(trust_remote_code), overwrite)} layers: {directory}")
