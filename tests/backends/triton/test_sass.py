"""Reading SASS and PTX: small listings, written by hand in the form of nvdisasm's and Triton's."""

import re

from mod_kernels.backends.triton import ptx, sass

LISTING = """
\t.headerflags\t@"EF_CUDA_SM90"
.text.kernel:
\t//## File "arguments", line 1
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128 R4, desc[UR16][R2.64] ;
\t//## File "arguments", line 3
        /*0030*/                   LDG.E.U16 R8, desc[UR16][R16.64+0x40] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.64 [R3], [R8.64] ;
\t//## File "arguments", line 2
        /*0060*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0070*/                   STL.64 [R1], R5 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


def test_instructions_of_a_listing():
    found = sass.read(LISTING)
    assert [one.name.split(".")[0] for one in found] == [
        "LDC", "BRA", "LDG", "LDG", "BRA", "LDGSTS", "STG", "STL", "EXIT", "BRA", "NOP",
    ]  # fmt: skip
    assert [(one.width, one.line) for one in found if one.loads] == [(16, 1), (2, 3), (8, 3)]
    assert [(one.width, one.line) for one in found if one.stores] == [(4, 2)]
    assert [one.target for one in found if one.target is not None] == [5, 2, 9]


def test_widths():
    names = ["LDG.E.U8", "LDG.E.S16.CONSTANT", "LDG.E", "STG.E.64", "LDG.E.LTC128B.128", "LDG.E.ENL2.256"]
    assert [sass.Instruction(name, 0).width for name in names] == [1, 2, 4, 8, 16, 32]


def test_loops_and_the_main_one():
    found = sass.read(LISTING)
    assert sass.loops(found) == [range(2, 5), range(9, 10)]
    assert sass.main_loop(found, lambda one: one.loads) == range(2, 5)
    assert sass.main_loop(found, lambda one: one.stores) is None


def test_of_loops_the_innermost_with_most_bytes():
    names = ["LDG.E", "LDG.E.64", "BRA", "BRA", "LDG.E.U16", "BRA"]
    targets = [None, None, 1, 0, None, 4]
    instructions = [sass.Instruction(name, 0, target) for name, target in zip(names, targets, strict=True)]
    assert sass.loops(instructions) == [range(1, 3), range(4), range(4, 6)]
    assert sass.main_loop(instructions, lambda one: one.loads) == range(1, 3)


PTX = """
.visible .entry kernel(
\t.param .u64 kernel_param_0,
\t.param .u64 kernel_param_1,
\t.param .u64 kernel_param_2
)
{
\t.loc\t1 7 0 // kernel.py:7:0; not ours
\tld.param.b64 \t%rd1, [kernel_param_0];
\tld.param.b64 \t%rd2, [kernel_param_1];
\tld.param.b64 \t%rd3, [kernel_param_2];
\tmad.lo.s64 \t%rd4, %rd3, 2, %rd1;
\tmov.b64 \t%rd8, %rd4;
$L__BB0_1:
\tadd.s64 \t%rd9, %rd8, 16;
\t// begin inline asm
\tmov.u32 %r1, 0;
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd9 + 0 ];
\t// end inline asm
\tmov.b64 \t%rd8, %rd9;
\tcp.async.cg.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 0x10, %r8;
\tld.global.L1::evict_last.b64 { %rd5 }, [ %rd2 + 8 ];
\tst.global.b32 [ %rd5 + 0 ], { %r1 };
\tselp.b64 \t%rd6, %rd1, %rd2, %p1;
\tst.global.b32 [ %rd6 + 0 ], { %r1 };
\tld.shared.b32 \t%r7, [%r9];
\t@%p2 bra \t$L__BB0_1;
\tret;
}
\t.file\t1 "/home/someone/kernel.py"
"""


def test_marks_say_which_pointer_an_access_goes_through():
    marked = ptx.mark_arguments(PTX, {0: "x_ptr", 1: "y_ptr"})
    assert re.findall(r"\.loc\t1 (\d+) 0\s+(?:@%p1 )?([\w.:]+)", marked) == [
        ("1", "ld.global.v4.b32"),
        ("2", "cp.async.cg.shared.global"),
        ("2", "ld.global.L1::evict_last.b64"),
        (str(ptx.UNKNOWN), "st.global.b32"),  # through a loaded address
        (str(ptx.UNKNOWN), "st.global.b32"),  # one of two
    ]
    assert "kernel.py" not in marked
    assert marked.count(".file") == 1


def test_marks_are_read_back():
    assert ptx.marked_argument(2, {0: "x_ptr", 1: "y_ptr"}) == "y_ptr"
    assert ptx.marked_argument(ptx.UNKNOWN, {0: "x_ptr"}) is None
