"""Which config a call gets: the innermost active one, else that of the environment as it is."""

import sys
import threading

import pytest

from sonicmoe.config import SonicMoEConfig


def test_current_hears_every_change_of_the_environment(monkeypatch):
    """It is asked before every call, so it reads the flags again only if something there has changed."""
    monkeypatch.delenv("SONIC_MOE_FP8_MODE", raising=False)
    before = SonicMoEConfig.current()
    assert SonicMoEConfig.current() is before and not before.use_fp8
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "perf")
    assert SonicMoEConfig.current().use_fp8
    monkeypatch.setenv("SONIC_MOE_FP8_MODE", "mem")
    assert SonicMoEConfig.current().stagewise
    monkeypatch.delenv("SONIC_MOE_FP8_MODE")
    assert SonicMoEConfig.current() == before
    monkeypatch.setenv("SONIC_MOE_FP8_MODUS", "perf")
    for _ in range(2):
        with pytest.raises(ValueError, match="SONIC_MOE_FP8_MODUS"):
            SonicMoEConfig.current()


def test_current_is_one_object_for_the_same_settings(monkeypatch):
    """Callers remember things by it. Where a value came from is part of it."""
    before = SonicMoEConfig.current()
    monkeypatch.setenv("SOMEBODY_ELSES", "1")
    assert SonicMoEConfig.current() is before
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "0")
    given = SonicMoEConfig.current()
    assert given == before and given is not before and given.source_of("fp8_wgrad") == "environment"


def test_activate_nests_and_unwinds(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    outer, inner = SonicMoEConfig(fp8_mode="perf"), SonicMoEConfig(fp8_mode="mem")
    with outer.activate() as active:
        assert active is outer
        assert SonicMoEConfig.current() is outer
        with inner.activate():
            assert SonicMoEConfig.current() is inner
            with outer.activate():
                assert SonicMoEConfig.current() is outer
            assert SonicMoEConfig.current() is inner
        assert SonicMoEConfig.current() is outer
        monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "nonsense")
        assert SonicMoEConfig.current() is outer
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "0")
    assert SonicMoEConfig.current() == SonicMoEConfig(fp8_wgrad=False)


def test_activate_unwinds_after_an_error():
    outer = SonicMoEConfig(fp8_mode="perf")
    with outer.activate():
        with pytest.raises(ZeroDivisionError), SonicMoEConfig(fp8_mode="mem").activate():
            raise ZeroDivisionError
        assert SonicMoEConfig.current() is outer
    assert SonicMoEConfig.current().fp8_mode is None


def test_threads_do_not_see_each_others_config():
    configs = [SonicMoEConfig(swiglu_clamp=float(n + 1)) for n in range(8)]
    together = threading.Barrier(len(configs), timeout=30)
    seen = [None] * len(configs)

    def work(n):
        with configs[n].activate():
            together.wait()  # every thread is inside its own block now
            first = SonicMoEConfig.current()
            with configs[n - 1].activate():
                together.wait()
                second = SonicMoEConfig.current()
            together.wait()
            third = SonicMoEConfig.current()
        seen[n] = (first, second, third)

    with SonicMoEConfig(backend="naive").activate() as mine:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(configs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert SonicMoEConfig.current() is mine
    for n, config in enumerate(configs):
        assert seen[n] is not None, f"thread {n} died"
        assert [id(one) for one in seen[n]] == [id(config), id(configs[n - 1]), id(config)]


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", False), reason="this Python hands a thread its starter's context"
)
def test_a_new_thread_starts_from_the_environment(monkeypatch):
    monkeypatch.setenv("SONIC_MOE_FP8_WGRAD", "1")
    seen = []
    with SonicMoEConfig(fp8_mode="perf", fp8_wgrad=False).activate():
        thread = threading.Thread(target=lambda: seen.append(SonicMoEConfig.current()))
        thread.start()
        thread.join()
    assert [(config.fp8_mode, config.fp8_wgrad) for config in seen] == [(None, True)]
