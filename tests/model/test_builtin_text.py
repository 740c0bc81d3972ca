from llmopt.model.builtin_text import builtin_text, calibration_text


def test_measured_text_is_not_calibration_text():
    measured, calibrated = (set(text().split("\n\n")) for text in (builtin_text, calibration_text))
    assert not measured & calibrated
    assert len(builtin_text()) > 150_000 < len(calibration_text())
