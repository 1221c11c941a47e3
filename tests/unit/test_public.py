"""What ``import durably`` offers is what it says it offers."""

import durably
import durably.errors
import durably_schemas


def test_every_public_name_is_there_and_listed_in_order():
    for module in (durably, durably_schemas):
        assert module.__all__ == sorted(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)


def test_every_error_is_public_and_drawn_in_the_tree():
    errors = {
        name
        for name, value in vars(durably.errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("_")
    }
    assert errors <= set(durably.__all__)
    assert all(name in (durably.errors.__doc__ or "") for name in errors)
