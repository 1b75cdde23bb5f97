"""Where Hopper's code waits, triggers and accesses memory, against dependent_launch.cuh's table.

On a GPU a load before the wait shows only if the kernel in front of it happens to be late, and the
compiler may move loads to where no reader of the source expects them. This reads the built library
and needs no GPU.
"""

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import omni_moe
from benchmarks import machine_code
from benchmarks.machine_code import Instruction, Kernel

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"

# Instructions that access memory before the wait, where the table in dependent_launch.cuh names
# any: at most so many, by kernel and number of waits in its code, as this version of nvcc compiles
# it. Others may unroll and copy in other ways: with them the kinds of instructions are checked, not
# how many.
COUNTED_WITH = "13.0"
BEFORE_WAIT = {
    ("expert_l2_tiled_dots", 2): {"LDG": 23, "STG": 4},  # with beside_previous
    # 2 loads of ids and 8 or 2 of rows before each wait. The others are on a way that no call
    # takes: without any pair the kernel reads the addend and stores.
    ("expert_l2_tiled_sum", 2): {"LDG": 15, "STG": 1},
    ("expert_l2_tiled_sum", 3): {"LDG": 19, "STG": 1},
}
# Loads by ld.global.nc in kernels launched early: only of tables that are part of the program.
CONSTANT_LOADS = {"router_forward_warp": "LDG.E.U8.CONSTANT"}  # of kRankPairs


@dataclass(frozen=True)
class Row:
    """A kernel in the table of dependent_launch.cuh."""

    launched: str  # "early", "plain"
    trigger: str  # "first", "after wait", "after barrier", "-"
    before_wait: str = ""  # "-": nothing; "- (…": nothing unless a flag says so; else what it is

    @property
    def is_early(self) -> bool:
        return self.launched == "early"


OTHERS = Row("plain", "-")


def read_table() -> dict[str, Row]:
    text = (CUDA_SOURCES / "common" / "dependent_launch.cuh").read_text()
    pattern = r"^// {2,}([\w*]+) {2,}(early|plain) {2,}(first|after \w+|-)(?: {2,}(\S.*))?$"
    return {name: Row(*row) for name, *row in re.findall(pattern, text, re.MULTILINE)}


def short_name(kernel: Kernel) -> str:
    return kernel.name.removesuffix("_kernel")


def row_of(kernel: Kernel, table: dict[str, Row]) -> Row:
    return next((r for n, r in table.items() if fnmatchcase(short_name(kernel), n)), OTHERS)


def accesses(instructions: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in instructions if instruction.touches_memory]


def faults(kernel: Kernel, row: Row) -> list[str]:
    """Where the machine code of a kernel departs from its row, one line each."""
    found = [
        *wait_faults(kernel, row),
        *trigger_faults(kernel, row),
        *(memory_faults(kernel, row) if row.is_early else []),
    ]
    return [f"{short_name(kernel)}: {fault} [{kernel.mangled}]" for fault in found]


def wait_faults(kernel: Kernel, row: Row) -> list[str]:
    waits = [instruction for instruction in kernel.instructions if instruction.waits]
    if row.is_early and not waits:
        return ["is launched early and never waits"]
    if not row.is_early and waits:
        return [f"is launched plainly and waits: {waits[0]}"]
    return []


def trigger_faults(kernel: Kernel, row: Row) -> list[str]:
    code = kernel.instructions
    triggers = [instruction for instruction in code if instruction.triggers]
    if row.trigger == "-":
        return [f"triggers: {trigger}" for trigger in triggers]
    if not triggers and row.trigger != "after barrier":  # which some instances do not have
        return [f"does not trigger, but shall ({row.trigger})"]
    if row.trigger == "first":
        before = accesses(kernel.reachable(lambda i: code[i].triggers))
        return [f"accesses memory before it triggers: {access}" for access in before]
    if row.trigger == "after wait":
        before = kernel.before_wait(guarded_waits_count=True)
    else:
        # The barrier of a grid is an atomic, by one thread of a block, between two of the block's.
        # Instances for evaluation have none: any barrier will do.
        arrivals = (at for at, i in enumerate(code) if i.base in ("ATOM", "ATOMG", "RED", "REDG"))
        arrival = next(arrivals, -1)
        before = kernel.reachable(
            lambda at: at > arrival and code[at].base in ("BAR", "UCGABAR_WAIT")
        )
        if row.is_early:
            before = before + kernel.before_wait()
    return [f"triggers before, not {row.trigger}: {i}" for i in before if i.triggers]


def memory_faults(kernel: Kernel, row: Row) -> list[str]:
    before = accesses(kernel.before_wait())
    found = [f"ld.global.nc before the wait: {i}" for i in before if i.is_constant_load]
    # A wait that a branch may jump over is one for the threads that do not.
    where_it_waits = accesses(kernel.before_wait(guarded_waits_count=True))
    if row.before_wait.startswith("-"):
        found += [f"accesses memory before the wait: {access}" for access in where_it_waits]
    if row.before_wait == "-":
        around = [access for access in before if access not in where_it_waits]
        found += [f"a way round the wait leads to an access: {access}" for access in around]
    else:
        is_by_flag = row.before_wait.startswith("-")
        found += excess_faults(kernel, before if is_by_flag else where_it_waits)
    for load in kernel.instructions:
        if load.is_constant_load and load.opcode != CONSTANT_LOADS.get(short_name(kernel)):
            found.append(f"ld.global.nc, which may move across the wait: {load}")
    return found


def excess_faults(kernel: Kernel, before: list[Instruction]) -> list[str]:
    name, waits = short_name(kernel), sum(i.waits for i in kernel.instructions)
    limits = BEFORE_WAIT.get((name, waits), {})
    if omni_moe.build_info()["cuda_version"] not in (COUNTED_WITH, ""):
        kinds = {base for (of, _), counts in BEFORE_WAIT.items() if of == name for base in counts}
        limits = dict.fromkeys(kinds, math.inf)
    places = defaultdict(list)
    for access in before:
        places[access.base].append(str(access))
    return [
        f"{len(found)} {base} before the wait, {limits.get(base, 0)} are known: {'; '.join(found)}"
        for base, found in places.items()
        if len(found) > limits.get(base, 0)
    ]


# ---- The built library ---------------------------------------------------------------------------


@dataclass
class Report:
    faults: list[str]
    kernels: Counter
    waiting: set[str]
    triggering: set[str]


@pytest.fixture(scope="module")
def report() -> Report:
    info = omni_moe.build_info()
    if not info["cuda_version"]:
        pytest.skip("the library was built without CUDA")
    if info["hopper_kernels"] != "yes":
        pytest.skip(f"no code of sm_90a in this build: {info['cuda_architectures']}")
    try:
        kernels = machine_code.disassemble(machine_code.LIBRARY, "sm_90a")
        table = read_table()
        result = Report([], Counter(), set(), set())
        for kernel in kernels:  # one at a time: all of them are some hundred thousand instructions
            result.faults += faults(kernel, row_of(kernel, table))
            result.kernels[short_name(kernel)] += 1
            if any(instruction.waits for instruction in kernel.instructions):
                result.waiting.add(short_name(kernel))
            if any(instruction.triggers for instruction in kernel.instructions):
                result.triggering.add(short_name(kernel))
    except machine_code.ToolMissing as missing:
        pytest.skip(str(missing))
    return result


def test_kernels_wait_trigger_and_access_memory_in_the_order_of_the_table(report):
    first = "\n".join(report.faults[:20])
    assert len(report.faults) == 0, f"the first 20 of {len(report.faults)}:\n{first}"


def test_every_row_of_the_table_is_a_kernel_and_the_other_way_round(report):
    table = read_table()

    def kernels_of(names):
        return {k for k in report.kernels if any(fnmatchcase(k, name) for name in names)}

    for name in table:
        assert kernels_of([name]), f"{name} is in the table, but not in the library"
    assert report.waiting == kernels_of([n for n, row in table.items() if row.is_early])
    assert report.triggering == kernels_of(
        [name for name, row in table.items() if row.trigger != "-"]
    )


def test_only_kernels_of_the_table_are_launched_early():
    early = {name for name, row in read_table().items() if row.is_early}
    launched, places = set(), Counter()
    for path in CUDA_SOURCES.rglob("*.cu*"):
        launched.update(re.findall(r"\blaunch_early\(\s*(\w+)_kernel\b", path.read_text()))
        places[path.name] += len(re.findall(r"\.is_early = ", path.read_text()))
    in_clusters = {"router_logits_forward", "gated_linear_forward", "gated_linear_backward"}
    assert launched == early - in_clusters
    # A further place that sets the option launches a kernel that this test does not know.
    assert +places == Counter(
        ["dependent_launch.cuh", "router_logits_sm90.cu", "gated_tile_sm90.cuh"]
    )


# ---- The check itself ----------------------------------------------------------------------------

LOAD = "LDG.E R2, desc[UR4][R2.64]"
STORE = "STG.E desc[UR4][R2.64], R3"


def kernel_of(*code: str, name: str = "some_kernel") -> Kernel:
    """A kernel as nvdisasm prints it; what ends with a colon is a label."""
    mangled = f"_ZN8omni_moe4cuda{len(name)}{name}IfEEvPf"
    lines, address = [f".text.{mangled}:", f"{mangled}:"], 0
    for line in (*code, "EXIT"):
        if line.endswith(":"):
            lines.append(line)
        else:
            lines.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    (kernel,) = machine_code.parse("\n".join(lines))
    return kernel


EARLY = Row("early", "-", "-")


def test_the_table_is_read():
    table = read_table()
    assert table["expert_l2_tiled_dots"].trigger == "after wait"
    assert table["expert_l2_tiled_sum"] == Row("early", "first", "ids, first rows")
    assert table["batch_norm_*"] == Row("plain", "after barrier")
    assert table["count_pairs"].launched == "plain" and "others" not in str(table.keys())
    # What the table calls an exception has bounds, and nothing else has.
    exceptions = {n for n, row in table.items() if row.is_early and row.before_wait != "-"}
    assert exceptions == {name for name, _ in BEFORE_WAIT}


def test_code_in_order_has_no_faults():
    assert faults(kernel_of("ACQBULK", LOAD, STORE), EARLY) == []
    assert faults(kernel_of("PREEXIT", "ACQBULK", LOAD), Row("early", "first", "-")) == []
    assert faults(kernel_of("ACQBULK", "PREEXIT", LOAD), Row("early", "after wait", "-")) == []
    arrival = "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R3"
    of_the_grid = ("BAR.SYNC 0x0", arrival, "BAR.SYNC 0x0", "PREEXIT")
    assert faults(kernel_of(LOAD, "BAR.SYNC 0x0", "PREEXIT"), Row("plain", "after barrier")) == []
    assert faults(kernel_of(LOAD, *of_the_grid), Row("plain", "after barrier")) == []
    # The bank of constants, shared memory and prefetches into L2 are no accesses that go wrong.
    harmless = ("LDC R1, c[0x0][0x28]", "LDS R2, [R3]", "CCTL.E.PF2 [R2]", "CCTL.IVALL")
    assert faults(kernel_of(*harmless, "ACQBULK", LOAD), EARLY) == []
    # Idle threads may leave without a wait, and what they jump over is behind it.
    assert faults(kernel_of("@P0 EXIT", "ACQBULK", LOAD), EARLY) == []
    assert faults(kernel_of("@P0 BRA `(.L_x_0)", "ACQBULK", LOAD, ".L_x_0:"), EARLY) == []


@pytest.mark.parametrize(
    "access",
    [
        LOAD,
        STORE,
        "@!P0 LDG.E.64 R2, desc[UR4][R2.64]",
        "LD.E R2, desc[UR4][R2.64]",
        "ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR4][R2.64], R3",
        "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64], R3",
        "UTMALDG.2D [UR8], [UR4]",
        "UTMASTG.2D [UR8], [UR4]",
        "UBLKCP.S.G [UR8], [UR4], UR6",
        "LDGSTS.E.128 [R4], desc[UR4][R2.64]",
        "CCTL.E.PF1 [R2]",
        "AN_UNKNOWN_ONE R2, desc[UR4][R2.64]",
    ],
)
def test_an_access_before_the_wait_is_found(access):
    (fault,) = faults(kernel_of("MOV R1, R2", access, "ACQBULK"), EARLY)
    assert fault.startswith("some: accesses memory before the wait: /*0010*/ ")
    assert access.split()[-1] in fault


def test_an_access_is_found_wherever_a_branch_leads_to_it():
    # The code is placed behind the wait, but runs before it.
    placed_last = kernel_of(
        "@P0 BRA `(.L_x_1)", ".L_x_0:", "ACQBULK", "EXIT", ".L_x_1:", LOAD, "BRA `(.L_x_0)"
    )
    assert "/*0030*/ LDG" in faults(placed_last, EARLY)[0]
    # One of two ways has no wait.
    one_way = kernel_of("@P0 BRA `(.L_x_0)", "NOP", "ACQBULK", ".L_x_0:", LOAD)
    assert "/*0030*/ LDG" in faults(one_way, EARLY)[0]
    # In a function called before the wait.
    called = kernel_of("CALL.REL.NOINC `($f)", "ACQBULK", "EXIT", "$f:", LOAD, "RET.REL.NODEC R4")
    assert "/*0030*/ LDG" in faults(called, EARLY)[0]
    # Where the threads of a warp meet again.
    met = kernel_of("BSSY B0, `(.L_x_1)", "BSYNC B0", "ACQBULK", "EXIT", ".L_x_1:", LOAD, "ACQBULK")
    assert "/*0040*/ LDG" in faults(met, EARLY)[0]


def test_a_wait_that_not_all_threads_run_is_none():
    by_predicate = kernel_of("@P0 ACQBULK", LOAD)
    by_branch = kernel_of("@P0 BRA `(.L_x_0)", "ACQBULK", ".L_x_0:", LOAD)
    for kernel in (by_predicate, by_branch):
        assert "a way round the wait" in faults(kernel, EARLY)[0]
        assert accesses(kernel.before_wait(guarded_waits_count=True)) == []


def test_a_missing_or_needless_wait_is_found():
    assert "never waits" in faults(kernel_of(LOAD), EARLY)[0]
    assert "plainly and waits: /*0000*/ ACQBULK" in faults(kernel_of("ACQBULK"), OTHERS)[0]


def test_triggers_out_of_place_are_found():
    def fault(trigger, *code, launched="early"):
        return faults(kernel_of(*code), Row(launched, trigger, "-"))[0]

    assert "triggers: /*0000*/ PREEXIT" in fault("-", "PREEXIT", launched="plain")
    assert "does not trigger" in fault("first", "ACQBULK")
    assert "before it triggers" in fault("first", "ACQBULK", LOAD, "PREEXIT")
    assert "not after wait" in fault("after wait", "PREEXIT", "ACQBULK")
    assert "not after barrier" in fault("after barrier", "PREEXIT", "BAR.SYNC 0x0", "ACQBULK")
    assert "not after barrier" in fault("after barrier", "BAR.SYNC 0x0", "PREEXIT", "ACQBULK")
    arrival = "@!P0 ATOMG.E.ADD.STRONG.GPU PT, R2, [R2.64], R3"
    too_early = ("BAR.SYNC 0x0", "PREEXIT", arrival, "BAR.SYNC 0x0")
    assert "not after barrier" in fault("after barrier", *too_early, launched="plain")


def test_the_dots_may_run_early_only_where_the_flag_says_so():
    row = Row("early", "after wait", "- (flag)")
    flagged = ("@P0 BRA `(.L_x_0)", "ACQBULK", ".L_x_0:")

    def dots(*code):
        return faults(kernel_of(*code, name="expert_l2_tiled_dots_kernel"), row)

    assert dots(*flagged, "PREEXIT", LOAD, STORE, "ACQBULK") == []
    assert "before the wait: /*0000*/ LDG" in dots(LOAD, *flagged, "PREEXIT")[0]
    assert "not after wait" in dots("PREEXIT", *flagged, LOAD)[0]
    (fault,) = dots(*flagged, "PREEXIT", *[STORE] * 5, "ACQBULK")
    assert "5 STG before the wait, 4 are known" in fault


def test_a_constant_load_is_found_before_and_behind_the_wait():
    load = "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]"
    assert "nc before the wait" in faults(kernel_of(load, "ACQBULK"), EARLY)[0]
    assert "may move across" in faults(kernel_of("ACQBULK", load), EARLY)[0]
    assert faults(kernel_of(load), OTHERS) == []


def test_a_jump_that_is_not_understood_is_no_pass():
    with pytest.raises(ValueError, match="where does this jump to"):
        faults(kernel_of("BRX R2 -0x10", "ACQBULK", LOAD), EARLY)
