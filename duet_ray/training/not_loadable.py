"""Why a model cannot be loaded, in one line that says what to do where there is something to do."""


def reason_of(error: Exception) -> str:
    """The first line of what a library says; of a model with code of its own, that the code is not run unasked."""
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which is not run unless model.trust_remote_code is true; read that code, "
            "and pin model.revision to the commit that you have read"
        )
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
