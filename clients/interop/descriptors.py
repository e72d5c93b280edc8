"""The descriptor set, for programs that know google.rpc already."""

import subprocess
from pathlib import Path

from calls import assert_equal
from examples import LIMIT
from gateway import Player
from report import Report


def write(program: str, file: Path) -> Path:
    command = [program, "descriptor", "--output", str(file)]
    subprocess.run(command, check=True, timeout=LIMIT)
    return file


def play(report: Report, player: Player, descriptors: Path) -> None:
    with report.check("the descriptor set, in a program that has google.rpc"):
        files = {
            "aep.ingestion.v1.BatchService": "aep/ingestion/v1/batch_service.proto",
            "google.rpc.ErrorInfo": "google/rpc/error_details.proto",
            "google.rpc.Status": "google/rpc/status.proto",
        }
        told = player.tell("load", set=str(descriptors), names=list(files))
        assert_equal(told, files, "files")


def protoc(report: Report, program: list[str], google: Path, root: Path, descriptors: Path) -> None:
    """Generates code. Google's own protos are in the folder `google`."""
    api = "aep/ingestion/v1/batch_service.proto"
    rpc = ["google/rpc/status.proto", "google/rpc/error_details.proto"]
    googles = descriptors.with_name("google.binpb")
    code = descriptors.with_name("protoc")
    code.mkdir(exist_ok=True)

    def run(*arguments: str) -> str:
        ran = subprocess.run([*program, *arguments], cwd=root, capture_output=True, text=True, timeout=LIMIT)
        assert ran.returncode == 0, ran.stderr
        return ran.stderr

    with report.check("code from the source, without a warning"):
        assert_equal(run("-I", "proto", f"--python_out={code}", api), "", "warnings")
    with report.check("code from the descriptor set"):
        run(f"--descriptor_set_in={descriptors}", f"--python_out={code}", api)
    with report.check("code from the descriptor set and google.rpc"):
        run("-I", str(google), "--include_imports", "-o", str(googles), *rpc)
        for both in [f"{descriptors}:{googles}", f"{googles}:{descriptors}"]:
            run(f"--descriptor_set_in={both}", f"--python_out={code}", api, *rpc)
