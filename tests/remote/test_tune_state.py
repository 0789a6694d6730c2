"""The host around a trial: read from a made-up /sys and /proc, and from a made-up NVML."""

import types

import gate_nvml
import pytest
import tune_state


@pytest.fixture
def sys(monkeypatch, tmp_path):
    """Writes files below /sys; no NVML."""
    monkeypatch.setattr(tune_state, "SYS", str(tmp_path))
    monkeypatch.setattr(tune_state, "_no_nvml", [])
    monkeypatch.setattr(gate_nvml, "by_uuid", lambda ask: "NVML: no driver")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    return write


def test_busy_cpus_are_those_that_were_not_idle(monkeypatch, tmp_path):
    # user nice system idle iowait irq softirq steal guest guest_nice
    looks = ["cpu 100 0 0 900 0 0 0 0 50 0\n", "cpu 130 0 10 1040 10 0 0 10 70 0\n"]
    monkeypatch.setattr(tune_state.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(tune_state, "PROC", str(tmp_path))
    monkeypatch.setattr(tune_state.time, "sleep", lambda seconds: (tmp_path / "stat").write_text(looks[1]))
    (tmp_path / "stat").write_text(looks[0])
    assert tune_state.busy_cpus() == pytest.approx(4 * 50 / 200)


def test_the_wait_ends_when_the_host_is_idle(monkeypatch, sys):
    busy = iter([3.0, 2.0, 0.1])
    monkeypatch.setattr(tune_state, "busy_cpus", lambda: next(busy))
    found = tune_state.wait_until_idle(60)
    assert found["is_idle"] and found["busy_cpus"] == 0.1


def test_the_wait_has_an_end(monkeypatch, sys):
    monkeypatch.setattr(tune_state, "busy_cpus", lambda: 500.0)
    assert tune_state.wait_until_idle(0) == {"waited_seconds": 0.0, "busy_cpus": 500.0, "is_idle": False}


def test_a_host_that_tells_nothing_has_no_figures(sys):
    samples = tune_state.Samples()
    samples.look()
    assert samples.told() == {"celsius": None, "mhz": None, "throttled": None, "gpus": {}}
    assert tune_state.Joules().used() is None


def test_temperature_clock_and_throttling_of_processors(sys):
    sys("class/hwmon/hwmon0/name", "nvme")
    sys("class/hwmon/hwmon0/temp1_input", 90000)
    sys("class/hwmon/hwmon1/name", "coretemp")
    sys("class/hwmon/hwmon1/temp1_input", 61000)
    for cpu, khz in enumerate((2000000, 3000000)):
        sys(f"devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq", khz)
    sys("devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", 5)
    samples = tune_state.Samples()
    samples.look()
    sys("class/hwmon/hwmon1/temp1_input", 55000)
    sys("devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", 7)
    samples.look()
    told = samples.told()
    assert (told["celsius"], told["mhz"]) == (61.0, 2500) and "2 times" in told["throttled"]


def test_energy_is_that_of_packages_and_memory_and_counters_begin_anew(sys):
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"),
                       ("intel-rapl:1", "psys")):  # fmt: skip
        sys(f"class/powercap/{zone}/name", name)
        sys(f"class/powercap/{zone}/max_energy_range_uj", 100_000_000)
        sys(f"class/powercap/{zone}/energy_uj", 90_000_000)
    joules = tune_state.Joules()
    sys("class/powercap/intel-rapl:0/energy_uj", 95_000_000)
    sys("class/powercap/intel-rapl:0:1/energy_uj", 3_000_000)  # began anew
    sys("class/powercap/intel-rapl:0:0/energy_uj", 99_000_000)  # part of the package
    assert joules.used() == pytest.approx(5 + 13)


class Nvml:
    NVMLError = type("NVMLError", (Exception,), {})
    NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = 0, 1

    def __init__(self, **answers):
        self.answers = answers

    def __getattr__(self, name):
        def answer(*_):
            if name not in self.answers:
                raise self.NVMLError("not supported")
            return self.answers[name]

        return answer


def test_what_nvml_tells_of_a_gpu_and_what_it_does_not(monkeypatch, sys):
    gpus = {
        "GPU-1": Nvml(nvmlDeviceGetTemperature=70, nvmlDeviceGetClockInfo=1400,
                      nvmlDeviceGetCurrentClocksThrottleReasons=0x04 | 0x20 | 0x01,
                      nvmlDeviceGetTotalEnergyConsumption=5000,
                      nvmlDeviceGetUtilizationRates=types.SimpleNamespace(gpu=80)),
        "MIG-2": Nvml(),
    }  # fmt: skip
    monkeypatch.setattr(gate_nvml, "by_uuid", lambda ask: {uuid: ask(nvml, None) for uuid, nvml in gpus.items()})
    samples = tune_state.Samples()
    samples.look()
    gpus["GPU-1"].answers["nvmlDeviceGetTemperature"] = 75
    samples.look()
    assert samples.told()["gpus"] == {
        "GPU-1": {"celsius": 75, "mhz": 1400, "throttled": "power limit, temperature"},
        "MIG-2": {"celsius": None, "mhz": None, "throttled": None},
    }
    joules = tune_state.Joules()
    gpus["GPU-1"].answers["nvmlDeviceGetTotalEnergyConsumption"] = 7500
    assert joules.used() == pytest.approx(2.5)
    monkeypatch.setattr(tune_state, "busy_cpus", lambda: 0.0)
    assert not tune_state.wait_until_idle(0)["is_idle"], "a GPU is at work"


def test_a_host_without_the_driver_is_asked_once(monkeypatch, sys):
    asked = []
    monkeypatch.setattr(gate_nvml, "by_uuid", lambda ask: asked.append(ask) or "NVML: no driver")
    assert tune_state.gpus() == tune_state.gpus() == {} and len(asked) == 1
