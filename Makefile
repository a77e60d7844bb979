# "make help" lists what there is.
SHELL = /bin/sh
VENV = .venv
BUILD = docs/_build
PORT = 8000
PATTERN =
PIP = $(VENV)/bin/python -m pip
# The first of these that is new enough. Searched for only if there is no .venv.
PYTHON = $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null \
  && echo $$python && break; done)
# A CUDA build of PyTorch says on stderr that it finds a toolkit, but no GPU.
export TORCH_LOGS = -torch.utils.cpp_extension

SPHINX = $(VENV)/bin/python -m sphinx -c .
GENERATED = docs/auto_examples $(BUILD)/doctrees $(BUILD)/staging $(BUILD)/backreferences
# Tutorials that were renamed or removed, but have copies: their pages must go, too.
scripts = $(patsubst $(1)/%,%,$(wildcard $(1)/*.py $(1)/*/*.py))
GONE = $(filter-out $(call scripts,examples),$(call scripts,docs/auto_examples))

.PHONY: html site browser test bench lint serve linkcheck clean help venv

# The lock ends with the process that holds the file, however that ends.
LOCK = mkdir -p $(BUILD); exec 9>$(BUILD)/lock; $(VENV)/bin/python -c \
  "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null \
  || $(call stop,another make builds in this folder. Try again when it is done.)

html: $(VENV)/installed
	@$(LOCK); $(MAKE) --no-print-directory site

# Only a complete site replaces the last one. After a build that failed or was
# interrupted all pages are read again, since Sphinx repeats a warning only then.
site: $(BUILD)/fresh
	@$(if $(GONE),rm -rf $(BUILD)/doctrees $(BUILD)/staging \
	  $(patsubst %.py,docs/auto_examples/%.*,$(GONE)))
	@[ ! -e $(BUILD)/building ] || rm -rf $(BUILD)/doctrees
	@# A published site has files that no build for another address removes.
	@echo "$(SITE_URL)" | cmp -s - $(BUILD)/address || rm -rf $(BUILD)/staging
	@echo "$(SITE_URL)" >$(BUILD)/address
	@touch $(BUILD)/building
	@$(SPHINX) -W -d $(BUILD)/doctrees docs $(BUILD)/staging \
	  $(if $(PATTERN),-D "sphinx_gallery_conf.filename_pattern=$(PATTERN)") \
	|| $(call stop,the build failed. $(BUILD)/html is as it was before.)
	@rm $(BUILD)/building
	@diff -rqx ".buildinfo*" $(BUILD)/staging $(BUILD)/html >/dev/null 2>&1 || { \
	  rm -rf $(BUILD)/next && cp -R $(BUILD)/staging $(BUILD)/next \
	  && rm -rf $(BUILD)/next/.buildinfo* $(BUILD)/html && mv $(BUILD)/next $(BUILD)/html; }
	@echo "Open $(BUILD)/html/index.html, or run: make serve"

browser: $(VENV)/tests-installed
	@$(VENV)/bin/python tests/browser.py

test: browser html lint
	@$(VENV)/bin/python -m pytest -c tests/pytest.ini tests -n 2 --no-loadscope-reorder

bench: $(VENV)/installed
	@$(VENV)/bin/python tests/bench.py

lint: $(VENV)/tests-installed
	@$(VENV)/bin/ruff check --config tests/ruff.toml .
	@$(VENV)/bin/ruff format --config tests/ruff.toml --check .
	@$(VENV)/bin/codespell --check-hidden --skip "*/_build,*/auto_examples,.venv,.git,*-LICENSE.txt"
	@$(VENV)/bin/sphinx-lint --enable all --disable line-too-long docs/*.rst examples README.md
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*
	@$(VENV)/bin/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(VENV)/bin/zizmor --offline --pedantic --no-progress .github

serve: html
	@$(VENV)/bin/python -m http.server $(PORT) --bind localhost --directory $(BUILD)/html

linkcheck: $(VENV)/installed
	@$(LOCK); $(MAKE) --no-print-directory $(BUILD)/fresh \
	&& $(SPHINX) -b linkcheck -d $(BUILD)/linkcheck/doctrees docs $(BUILD)/linkcheck

clean:
	rm -rf docs/auto_examples $(BUILD)

help:
	@echo "make html       build the site into $(BUILD)/html"
	@echo "make html PATTERN=batched_jac"
	@echo "                the same, but run only tutorials whose path matches"
	@echo "make test       build the site and run every check"
	@echo "make bench      measure every ratio of speed and memory, in one run"
	@echo "make lint       run the checks that need no site"
	@echo "make serve      build the site and show it on http://localhost:$(PORT), or PORT=..."
	@echo "make linkcheck  ask the sites that pages link to whether the links work"
	@echo "make clean      remove everything that was built, but keep $(VENV)"
	@echo "PYTHON=...      the Python for $(VENV), at least 3.11"
	@echo "PIP=...         the installer, for example PIP=\"uv pip\""

# A newer configuration or another environment runs every tutorial again, because
# Sphinx-Gallery looks at nothing but the script.
$(BUILD)/fresh: $(VENV)/installed conf.py $(wildcard docs/_ext/*.*)
	@rm -rf $(GENERATED) && mkdir -p $(BUILD) && touch $@

stop = { echo "make: $(1)" >&2; exit 1; }
install = $(PIP) --help >/dev/null \
  || $(call stop,$(PIP) does not run. Install it or try: rm -rf $(VENV)); \
  VIRTUAL_ENV="$(abspath $(VENV))" $(PIP) install -r $(1) \
  || $(call stop,could not install $(1). Is there a network?)
new_enough = $(1) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null
version = $(1) -c "import sys; print(sys.version)"

# Looked at in each run, but no reason to install anything again.
venv:
ifeq ($(wildcard $(VENV)),)
	@[ -n "$(PYTHON)" ] || $(call stop,needs Python 3.11 or newer. Name one with PYTHON=...)
	@$(call new_enough,$(PYTHON)) || $(call stop,$(PYTHON) is not Python 3.11 or newer.)
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null \
	|| $(call stop,$(PYTHON) lacks the module venv. On Debian: apt install python3-venv)
	@$(PYTHON) -m venv $(VENV)
else
	@$(call new_enough,$(VENV)/bin/python) \
	|| $(call stop,$(VENV) has no Python 3.11 or newer that runs. Try: rm -rf $(VENV))
endif
ifeq ($(origin PYTHON),command line)
	@[ "$$($(call version,$(PYTHON)))" = "$$($(call version,$(VENV)/bin/python))" ] \
	|| $(call stop,$(VENV) was made with another Python than $(PYTHON). Try: rm -rf $(VENV))
endif

$(VENV)/installed: requirements.txt | venv
	@$(call install,requirements.txt)
	@touch $@

$(VENV)/tests-installed: tests/requirements.txt $(VENV)/installed
	@$(call install,tests/requirements.txt)
	@touch $@
