"""Settings broken in random places: either they are settings, or every problem is a line that names its key."""

from hypothesis import given

from llamafleet.cli.arguments import default_data
from llamafleet.settings.schema import Settings, SettingsError
from tests.mutations import FUZZ, broken

DATA = {
    **default_data(),
    "models": [
        {"name": "gpt", "source": "hf:o/r/f.gguf", "port": 9001, "kv_types": ["q8_0", "f16"], "slots": 2},
        {"name": "tiny", "source": "/t.gguf", "port": 9002, "extra_flags": ["--temp 0.2"], "api_key_file": "/keys"},
    ],
}


@FUZZ
@given(broken(DATA))
def test_broken_settings_are_read_or_refused_by_key(data):
    try:
        Settings.from_data(data)
    except SettingsError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.isprintable() and len(problem) < 1200, problem  # an unknown key lists all known ones
            assert ": " in problem and not problem.startswith(":")
