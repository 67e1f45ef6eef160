"""What all experiments share."""

import pytest

from experiments import runner


@pytest.mark.parametrize(
    ("flags", "asked", "precision", "reason"),
    [
        ("avx2 avx512_bf16 amx_bf16", "auto", "bfloat16", "amx_bf16, avx512_bf16"),
        ("avx2 avx512f", "auto", "float32", "no bfloat16"),
        (None, "auto", "float32", "no bfloat16"),
        ("avx2 amx_bf16", "float32", "float32", "as asked"),
        ("avx2", "bfloat16", "bfloat16", "as asked"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_has_it(
    flags, asked, precision, reason, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(runner, "_CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags} sse\n")
    with caplog.at_level("WARNING"):
        found, why = runner.choose_precision(asked)
    assert found == precision and reason in why
    assert ("slower" in caplog.text) == (asked == "bfloat16")
