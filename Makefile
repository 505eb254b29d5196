# make demo and make test need python3, and for the tests pip or venv; nothing else.
PYTHON ?= python3
PREFIX ?= /usr/local
DEMO   := build/demo

.PHONY: help demo test test-all bench install clean
help:
	@echo 'make demo | test | test-all | bench | install [PREFIX=] [DESTDIR=] | clean'

# The trap keeps the shell, or make would call the Ctrl-C an error.
demo:
	@mkdir -p $(DEMO)
	@printf '%s\n' \
	  'web: exec $(PYTHON) -m http.server $$PORT' \
	  'worker: n=0; while :; do n=$$((n+1)); echo "job $$n done"; sleep 3; done' \
	  'clock: while :; do date; sleep 10; done' > $(DEMO)/Procfile
	@trap : INT; port=$$($(PYTHON) -c 'import socket; print(next(p for p in range(5000, 60000, 100) if socket.socket().connect_ex(("localhost", p))))'); \
	echo "This runs a web server, a worker and a clock side by side: open http://localhost:$$port/ in a browser, and end them all with Ctrl-C."; \
	$(PYTHON) procrun.py start -f $(DEMO)/Procfile -p $$port $(ARGS) || [ $$? = 130 ]

# The tests run with the first Python that has pytest, $(PYTHON) itself or a virtual environment, in
# two parts side by side.
test:
	@PYTHON='$(PYTHON)'; \
	if ! $$PYTHON -c 'import pytest' 2>/dev/null; then \
	  version=$$($$PYTHON -c 'import sys; print("%d.%d" % sys.version_info[:2])') || \
	    { echo 'make test: no $(PYTHON); set PYTHON=' >&2; exit 1; }; \
	  venv=.venv-$$version; \
	  if ! $$venv/bin/python -c 'import pytest' 2>/dev/null; then \
	    rm -rf $$venv; \
	    { $$PYTHON -m venv $$venv 2>/dev/null || $$PYTHON -m virtualenv -q $$venv; } || \
	      { echo 'make test: pytest is missing, and neither venv nor virtualenv can make a place for it (Debian: apt install python3-venv)' >&2; exit 1; }; \
	    $$venv/bin/python -m pip install -q --disable-pip-version-check pytest || \
	      { echo 'make test: pip could not install pytest' >&2; exit 1; }; \
	  fi; \
	  PYTHON=$$venv/bin/python; \
	fi; \
	mkdir -p build; \
	PROCRUN_PART=1 $$PYTHON -m pytest -q -p no:cacheprovider test_procrun.py $(ARGS) >build/part-1 2>&1 & part=$$!; \
	PROCRUN_PART=2 $$PYTHON -m pytest -q -p no:cacheprovider test_procrun.py $(ARGS); status=$$?; \
	wait $$part || status=$$?; cat build/part-1; exit $$status

# Every CPython from 3.8 on that is on PATH or under pyenv, but for the version TESTED.
test-all:
	@found=$(TESTED); seen=' $(TESTED) '; \
	for python in $$(ls -d $$(echo "$$PATH" | tr : '\n' | sed 's|$$|/python3*|') "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/python3 2>/dev/null); do \
	  case $$python in *-config|*-intel64|*t) continue;; esac; \
	  version=$$($$python -c 'import sys; assert sys.version_info >= (3, 8) and sys.implementation.name == "cpython"; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  case $$seen in *" $$version "*) continue;; esac; \
	  seen="$$seen$$version "; found=1; \
	  echo "== CPython $$version ($$python)"; \
	  $(MAKE) test PYTHON=$$python || exit 1; \
	done; \
	[ -n "$$found" ] || { echo 'make test-all: no CPython from 3.8 on was found' >&2; exit 1; }

bench:
	@$(PYTHON) test_procrun.py bench

install:
	install -d '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 procrun.py '$(DESTDIR)$(PREFIX)/bin/procrun'

clean:
	rm -rf build __pycache__ .pytest_cache .venv*
