"""The process that compiles: reads jobs as lines of JSON, writes outcomes as lines of JSON.

It is run as a script by whichever Triton compiles for a target, from 3.2 on, or a fork of it, and
depends on nothing but that. A job's source lies in a file; machine code and assembly are written
beside it.
"""

# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import traceback


def source_of(fn, job):
    """Return Triton's description of what to compile, in the form its version wants."""
    from triton.compiler import ASTSource

    names = list(fn.arg_names)
    signature = dict(job["signature"])
    constants = dict(job["constants"])
    aligned = [names.index(name) for name in job["aligned"]]
    try:
        from triton.backends.compiler import AttrsDescriptor  # until 3.2

        attrs = AttrsDescriptor.from_dict(
            {
                "arg_properties": {"tt.divisibility": aligned, "tt.equal_to": []},
                "cls": "AttrsDescriptor",
            }
        )
        return ASTSource(fn=fn, signature=signature, constants=constants, attrs=attrs)
    except ImportError:
        signature |= dict.fromkeys(constants, "constexpr")
        ordered = {name: signature[name] for name in names}
        attrs = {(i,): [["tt.divisibility", 16]] for i in aligned}
        places = {(names.index(n),): v for n, v in constants.items()}
        return ASTSource(fn=fn, signature=ordered, constexprs=places, attrs=attrs)


class Done(BaseException):
    """Ends Triton's compiling after the last stage that is kept; Triton catches no such thing."""


def compiled(source, target, options, keep, begun):
    """Return what the stages of Triton's compiler made, by their names, and its metadata.

    Stages after the last of `keep` are not run: they may need tools that are not there. The names
    of those that are run are added to `begun`.
    """
    import triton
    from triton.compiler.compiler import make_backend

    backend = type(make_backend(target))
    whole = backend.add_stages
    kept = {}
    notes = {}

    def add_stages(self, stages, *rest):
        whole(self, stages, *rest)
        names = list(stages)
        missing = [name for name in keep if name not in names]
        if missing:
            raise ValueError(f"there is no stage {missing[0]}, only {', '.join(names)}")
        last = max(keep, key=names.index)
        for name in names:
            stages[name] = watched(name, stages[name], ends=name == last and last != names[-1])

    def watched(name, stage, ends):
        def run(module, metadata):
            begun.append(name)
            made = stage(module, metadata)
            if name in keep:
                kept[name] = made if isinstance(made, (str, bytes)) else str(made)
            notes.update(metadata)
            if ends:
                raise Done
            return made

        return run

    backend.add_stages = add_stages
    try:
        made = triton.compile(source, target=target, options=options)
    except Done:
        return kept, notes
    finally:
        backend.add_stages = whole
    return made.asm, made.metadata._asdict()


def compile_job(job, begun):
    """Return the metadata of a compiled job, its files written."""
    from triton.backends.compiler import GPUTarget

    spec = importlib.util.spec_from_file_location("dilu_kernels", job["path"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fn = getattr(module, job["function"])
    options = {
        "num_warps": job["warps"],
        "num_stages": job["stages"],
        "enable_fp_fusion": True,
    }
    target = GPUTarget(job["backend"], job["arch"], job["warp"])
    asm, metadata = compiled(source_of(fn, job), target, options, job["keep"], begun)
    files = {}
    for kind, content in asm.items():
        if kind in job["keep"]:
            files[kind] = f"{job['path']}.{kind}"
            mode = "wb" if isinstance(content, bytes) else "w"
            with open(files[kind], mode) as out:
                out.write(content)
    found = inspected_cubin(files["cubin"], job) if "cubin" in files else inspected_text(asm, job)
    return {
        "files": files,
        "symbol": metadata.get("name", job["function"]),
        "shared": int(metadata.get("shared") or 0),
        "threads": int(metadata.get("num_warps", job["warps"])) * job["warp"],
        **found,
    }


def tool(name):
    """Return the path of a tool that Triton brings along."""
    import triton

    return str(pathlib.Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / name)


def output_of(*command):
    """Return what a command prints; raise CalledProcessError where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(text, opcodes):
    """Return how often each opcode stands in machine code as text."""
    return {name: n for name in opcodes if (n := len(re.findall(rf"\b{name}", text)))}


def inspected_cubin(path, job):
    """Return registers, spills and matrix instructions of NVIDIA machine code."""
    usage = output_of(tool("cuobjdump"), "-res-usage", path)
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    code = output_of(tool("nvdisasm"), "-c", path) if job["matrix"] else ""
    with open(f"{path[: -len('.cubin')]}.ptx") as ptx:
        head = ptx.read().partition(".entry")[2].partition(")")[0]
    return {
        "registers": int(registers[1]) if registers else None,
        "spills": int(stack[1]) if stack else None,
        "instructions": counted(code, job["matrix"]),
        "parameters": len(re.findall(r"\.param", head)),
    }


def inspected_text(asm, job):
    """Return registers, spills and matrix instructions of AMD machine code, from its assembly;
    of other devices' code, what can be counted in the texts that led to it."""
    text = asm.get("amdgcn") or "\n".join(each for each in asm.values() if isinstance(each, str))
    found = {
        name: re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
    }
    counts = {name: int(m[1]) for name, m in found.items() if m}
    kinds = re.findall(r"\.value_kind:\s+(\w+)", text)
    spills = counts.get("vgpr_spill_count")
    return {
        "registers": counts.get("vgpr_count"),
        "spills": None if spills is None else 4 * spills,
        "instructions": counted(text, job["matrix"]),
        "parameters": sum(not kind.startswith("hidden") for kind in kinds) or len(job["signature"]),
    }


def reason_of(error):
    """Return what went wrong, the innermost cause first: Triton wraps errors once for each call."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    lines = [traceback.format_exception_only(type(e), e) for e in reversed(causes)]
    return "\n".join("".join(text).strip() for text in lines)


def main():
    """Answer jobs, a line of JSON each, until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        job = json.loads(line)
        begun = []
        try:
            reply = {"id": job["id"], **compile_job(job, begun)}
        except BaseException as error:  # whatever a compiler raises is the job's outcome
            if isinstance(error, KeyboardInterrupt):
                return
            text = reason_of(error)
            stage = begun[-1] if begun else ""
            reply = {"id": job["id"], "error": text, "kind": type(error).__name__, "stage": stage}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
