"""The machine code of the built library: what ran on a device, and in which order.

    python -m benchmarks.machine_code     where the kernels of sm_90a wait, trigger and read

Reads the cubins in libomni_moe.so in two ways. `fingerprint` hashes the bytes of each kernel, to
tell whether a measurement was made with the kernels that are built now. `disassemble` gives the
instructions and the order in which they can run. cuobjdump and nvdisasm come with CUDA or Triton.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import omni_moe

LIBRARY = Path(omni_moe.__file__).parent / "lib" / "libomni_moe.so"


class ToolMissing(RuntimeError):
    """This machine has no cuobjdump or no nvdisasm."""


def find_tool(name: str) -> Path:
    """A program of CUDA's binary utilities: from PATH, the CUDA toolkit or Triton's package."""
    folders = list(filter(None, os.environ.get("PATH", "").split(os.pathsep)))
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders += [f"{home}/bin" for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton and triton.submodule_search_locations:
        folders += [f"{place}/backends/nvidia/bin" for place in triton.submodule_search_locations]
    found = shutil.which(name, path=os.pathsep.join(folders))
    if not found:
        raise ToolMissing(f"no {name} in PATH, in CUDA_HOME/bin or in the triton package")
    return Path(found).resolve()


# ---- Cubins --------------------------------------------------------------------------------------


@contextmanager
def extract_cubins(library: Path, architecture: str) -> Iterator[list[Path]]:
    """The library's cubins of an architecture, as files that live as long as the block.

    `sm_90` includes the code of sm_90a, `sm_90a` is that code alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        _cuobjdump(["-arch", architecture, "-xelf", "all"], library, Path(folder))
        yield sorted(Path(folder).glob("*.cubin"))


def architecture_for(capability: tuple[int, int], library: Path) -> str | None:
    """The library's code that runs on a device, e.g. `sm_80` on one of capability 8.6.

    None if the library has only PTX for it, which the driver compiles.
    """
    major, minor = capability
    names = re.findall(r"\.sm_(\d+)(\d)[a-z]?\.cubin", _cuobjdump(["-lelf"], library))
    fitting = [int(m) for first, m in names if int(first) == major and int(m) <= minor]
    return f"sm_{major}{max(fitting)}" if fitting else None


def _cuobjdump(options: list[str], library: Path, folder: Path | None = None) -> str:
    command = [find_tool("cuobjdump"), *options, library.resolve()]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    message = (run.stderr or run.stdout).strip()
    # A build without CUDA is no fault.
    if run.returncode and "does not contain device code" not in message:
        raise RuntimeError(f"cuobjdump {library}: {message}")
    return run.stdout


def function_name(mangled: str) -> str:
    """`place_pairs_kernel` of `_ZN8omni_moe4cuda…18place_pairs_kernelEPKv…`.

    Scopes are dropped because they are not stable: an anonymous namespace is named by a hash of the
    file's path, CUB's namespace by the architectures of the build.
    """
    rest, name = re.sub(r"^_ZN?", "", mangled), mangled
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


# ---- Fingerprint ---------------------------------------------------------------------------------


def fingerprint(library: Path, architecture: str) -> dict[str, str]:
    """A hash of each kernel's machine code; empty where the library has none for the architecture.

    The instances of a template are one entry. What is hashed is what runs: instructions, literal
    constants and the size of shared memory, no names and no paths.
    """
    digests = defaultdict(list)
    with extract_cubins(library, architecture) as cubins:
        for cubin in cubins:
            for kernel, code in _code_of_kernels(cubin.read_bytes()).items():
                digests[function_name(kernel)].append(hashlib.sha256(code).digest())
    return {
        name: hashlib.sha256(b"".join(sorted(digests[name]))).hexdigest()[:8]
        for name in sorted(digests)
    }


def _code_of_kernels(cubin: bytes) -> dict[str, bytes]:
    sections = dict(_sections(cubin))
    kernels = {}
    for section, (_, code) in sections.items():
        if section.startswith(".text."):
            kernel = section.removeprefix(".text.")
            shared_bytes, _ = sections.get(f".nv.shared.{kernel}", (0, b""))
            _, literals = sections.get(f".nv.constant2.{kernel}", (0, b""))
            kernels[kernel] = struct.pack("<QQ", shared_bytes, len(literals)) + literals + code
    return kernels


def _sections(elf: bytes) -> Iterator[tuple[str, tuple[int, bytes]]]:
    """(name, (size, content)) of a 64-bit ELF file."""
    (headers_at,) = struct.unpack_from("<Q", elf, 40)
    count, index_of_names = struct.unpack_from("<HH", elf, 60)
    # name, type, flags, address, offset, size
    headers = [struct.unpack_from("<IIQQQQ", elf, headers_at + 64 * i) for i in range(count)]
    names_at = headers[index_of_names][4]
    for name_at, kind, _, _, offset, size in headers:
        name = elf[names_at + name_at : elf.index(b"\0", names_at + name_at)].decode()
        has_content = kind != 8  # SHT_NOBITS
        yield name, (size, elf[offset : offset + size] if has_content else b"")


# ---- Instructions --------------------------------------------------------------------------------

# Instructions that may read or write global memory, by generic addresses and bulk copies too.
_MEMORY = {
    "LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS", "CCTL", "CCTLT",
    "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "SUST", "SULD", "SUATOM", "SURED",
    "TEX", "TLD", "TLD4",
}  # fmt: skip
# Prefetches into L2, where memory is coherent, and the invalidation of L1.
_HARMLESS = re.compile(r"CCTL\.(E\.)?PF2|CCTL\.IVALL")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
_TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    guard: str  # "@P0" or "@!P0": runs only where the predicate holds, or does not; else ""
    opcode: str  # with its suffixes
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def waits(self) -> bool:  # griddepcontrol.wait
        return self.base == "ACQBULK"

    @property
    def triggers(self) -> bool:  # griddepcontrol.launch_dependents
        return self.base == "PREEXIT"

    @property
    def touches_memory(self) -> bool:
        """Whether it accesses global memory; `desc[…]` is part of such addresses."""
        is_access = self.base in _MEMORY or "desc[" in self.operands
        return is_access and not _HARMLESS.match(self.opcode)

    @property
    def is_constant_load(self) -> bool:  # ld.global.nc
        return self.base == "LDG" and ".CONSTANT" in self.opcode

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found and found[1]

    def __str__(self) -> str:
        words = (f"/*{self.address:04x}*/", self.guard, self.opcode, self.operands)
        return " ".join(filter(None, words))


@dataclass
class Kernel:
    mangled: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index of the instruction behind it

    @property
    def name(self) -> str:
        return function_name(self.mangled)

    def before_wait(self, guarded_waits_count: bool = False) -> list[Instruction]:
        """The instructions that a thread can run before it has waited, in the order of addresses.

        Each branch may go either way. `guarded_waits_count`: but for one that jumps over nothing
        but a wait, which counts as the wait.
        """

        def has_waited(index: int) -> bool:
            instruction = self.instructions[index]
            if instruction.waits:
                return guarded_waits_count or not instruction.guard
            return (
                guarded_waits_count
                and instruction.base == "BRA"
                and self.labels.get(instruction.target) == index + 2
                and self.instructions[index + 1].waits
            )

        return self.reachable(has_waited)

    def reachable(self, stop: Callable[[int], bool]) -> list[Instruction]:
        """The instructions that can run if threads end at the first one for which `stop` holds."""
        meeting_points = self._meeting_points()
        found, pending = {0}, [0]
        while pending:
            index = pending.pop()
            if not stop(index):
                new = [i for i in self._successors(index, meeting_points) if i not in found]
                found.update(new)
                pending += new
        return [self.instructions[i] for i in sorted(found)]

    def _successors(self, index: int, meeting_points: dict[str, set[int]]) -> list[int]:
        instruction = self.instructions[index]
        base, target = instruction.base, instruction.target
        if base in ("BRX", "BRXU", "JMX", "JMXU"):
            raise ValueError(f"{self.mangled}: where does this jump to? {instruction}")
        if base == "BSYNC":  # where threads meet, to go on at the target of this barrier's BSSY
            targets = meeting_points[instruction.operands]
            return [index + 1] if index + 1 in targets else sorted(targets)
        result = []
        if base in ("BRA", "JMP", "CALL") and target in self.labels:
            result.append(self.labels[target])
        ends = base in ("EXIT", "RET", "KILL") or instruction.opcode == "BPT.TRAP"
        # A branch with further operands beside the target is conditional.
        jumps = base in ("BRA", "JMP") and instruction.operands == f"`({target})"
        if (instruction.guard or not (ends or jumps)) and index + 1 < len(self.instructions):
            result.append(index + 1)
        return result

    def _meeting_points(self) -> dict[str, set[int]]:
        points = defaultdict(set)
        for instruction in self.instructions:
            if instruction.base == "BSSY":
                barrier = instruction.operands.partition(",")[0]
                points[barrier].add(self.labels[instruction.target])
        return points


def parse(text: str) -> list[Kernel]:
    """The kernels of what nvdisasm prints."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            address, guard, opcode, operands = match.groups()
            kernels[-1].instructions.append(
                Instruction(int(address, 16), guard or "", sys.intern(opcode), operands.strip())
            )
        elif line.endswith(":") and not line[0].isspace():
            label = line[:-1]
            if label.startswith(".text."):
                kernels.append(Kernel(label.removeprefix(".text.")))
            elif kernels:
                kernels[-1].labels[label] = len(kernels[-1].instructions)
    return kernels


def disassemble(library: Path, architecture: str) -> Iterator[Kernel]:
    """All kernels that the library has for the architecture."""
    nvdisasm = find_tool("nvdisasm")

    def run(cubin: Path) -> str:
        command = [nvdisasm, "--print-code", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvdisasm {cubin.name}: {done.stderr.strip()}")
        return done.stdout

    with extract_cubins(library, architecture) as cubins:
        cubins.sort(key=lambda cubin: cubin.stat().st_size, reverse=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for text in pool.map(run, cubins):
                yield from parse(text)


def summary(kernel: Kernel) -> dict[str, int]:
    """How often the kernel waits and triggers, and what it does before and behind the wait."""
    before = kernel.before_wait()
    constant_loads = sum(i.is_constant_load for i in kernel.instructions)
    constant_before = sum(i.is_constant_load for i in before)
    return {
        "waits": sum(i.waits for i in kernel.instructions),
        "triggers": sum(i.triggers for i in kernel.instructions),
        "triggers before the wait": sum(i.triggers for i in before),
        "accesses before": sum(i.touches_memory for i in before),
        "nc loads before": constant_before,
        "nc loads behind only": constant_loads - constant_before,
    }


def main() -> None:
    rows = Counter()
    for kernel in disassemble(LIBRARY, "sm_90a"):
        rows[kernel.name, tuple(summary(kernel).items())] += 1
    for (name, numbers), count in sorted(rows.items()):
        text = ", ".join(f"{what} {number}" for what, number in numbers)
        print(f"{count:3d} x {name}: {text}")


if __name__ == "__main__":
    main()
