"""JupyterLab in headless Chromium for the tests: start it, run notebooks, move sliders."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ABSENT = "" if CHROMIUM and DRIVER else "needs Chromium and its driver: apt-get install chromium chromium-driver"


class Server:
    """A JupyterLab server on a folder, without the user's settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free_socket:
            free_socket.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free_socket.getsockname()[1]}"
        folders = {
            name: str(folder / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
        }
        options = {
            "ServerApp.port": self.url.rsplit(":", 1)[1],
            "ServerApp.root_dir": folder,
            "ServerApp.port_retries": 0,
            "IdentityProvider.token": "",
            "LabApp.expose_app_in_browser": True,
            "LabApp.user_settings_dir": folder / "settings",
            "LabApp.extension_manager": "readonly",
        }
        notifications = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        notifications.parent.mkdir(parents=True)
        notifications.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # no dialogs, no network calls
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--allow-root")
        self.log = open(folder / "jupyterlab.log", "w")  # noqa: SIM115 (open while the server runs)
        self.process = subprocess.Popen(command, env={**os.environ, **folders}, stdout=self.log, stderr=self.log)
        until(self._answers, 120, "JupyterLab does not answer")

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended: {Path(self.log.name).read_text()[-2000:]}")
        try:
            return urllib.request.urlopen(f"{self.url}/api/status", timeout=5).status == 200
        except OSError:
            return False

    def close(self) -> None:
        """Stop the server and with it its kernels."""
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()  # no effect if it has ended
            self.log.close()


class Lab:
    """A browser window on a `Server`."""

    def __init__(self, server: Server, width: int = 1280, height: int = 1000) -> None:
        options = Options()
        options.binary_location = CHROMIUM or ""
        for argument in ("--headless=new", f"--window-size={width},{height}", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium needs it as root
        for switch in ("--disable-background-networking", "--hide-scrollbars"):
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.server = server
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.driver.set_script_timeout(30)

    def open(self, notebook: str) -> None:
        """Open a notebook of the server's folder and wait for its kernel."""
        self.driver.get(f"{self.server.url}/lab/workspaces/{Path(notebook).stem}/tree/{notebook}?reset")
        until(lambda: self._kernel() == "idle", 180, f"no kernel for {notebook}")

    def _kernel(self) -> Any:
        return self.driver.execute_script(
            "return window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status"
        )

    def run_all(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Run all cells and wait for the last one; call `meanwhile` repeatedly.

        Raises
        ------
        AssertionError
            If a cell shows an error, or the cells take longer than `seconds`.
        """
        self.driver.execute_script("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        state = """
            const cells = Array.from(window.jupyterapp.shell.currentWidget.content.model.cells);
            const code = cells.filter(cell => cell.type === 'code');
            const outputs = code.flatMap(cell => cell.outputs.toJSON());
            return [code.filter(cell => !cell.executionCount).length,
                    outputs.filter(one => one.output_type === 'error').map(one => one.ename + ': ' + one.evalue)];
        """

        def done() -> bool:
            waiting, errors = self.driver.execute_script(state)
            assert not errors, errors
            meanwhile()
            return waiting == 0 and self._kernel() == "idle"

        until(done, seconds, "the cells are not done")

    def slider(self, label: str) -> WebElement:
        """Return the handle of the slider with this label, scrolled into view."""
        assert self.show_widgets(), "no widget in this notebook"
        path = f"//*[contains(@class, 'widget-slider')][.//label[normalize-space()='{label}']]"
        handles: list[WebElement] = []

        def has_slider() -> bool:
            handles[:] = self.driver.find_elements(By.XPATH, path + "//*[contains(@class, 'noUi-handle')]")
            return bool(handles)

        until(has_slider, 20, f"no slider '{label}'")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'start'})", handles[0])
        return handles[0]

    def show_widgets(self) -> bool:
        """Scroll to the first cell with a widget and return whether there is one; hidden cells are not in the page."""
        script = """
            const panel = window.jupyterapp.shell.currentWidget.content;
            const shown = cell => cell.type === 'code' && cell.outputs.toJSON().some(
                one => one.data && 'application/vnd.jupyter.widget-view+json' in one.data);
            const index = Array.from(panel.model.cells).findIndex(shown);
            if (index >= 0) { panel.activeCellIndex = index; panel.scrollToItem(index, 'start'); }
            return index;
        """
        return self.driver.execute_script(script) >= 0

    def press(self, handle: WebElement, key: str = Keys.ARROW_RIGHT) -> None:
        """Move a slider by one step with the keyboard."""
        self.driver.execute_script("arguments[0].focus()", handle)
        handle.send_keys(key)

    def picture(self) -> Any:
        """Return a checksum of the widget's picture, with its width and height [pixels]; None if there is none."""
        return self.driver.execute_script("""
            const image = document.querySelector('img.widget-image');
            if (!image || !image.complete || !image.naturalWidth) return null;
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            let sum = 0;
            for (const value of context.getImageData(0, 0, canvas.width, canvas.height).data)
                sum = (sum * 31 + value) % 4294967291;
            return [sum, image.naturalWidth, image.naturalHeight];
        """)

    def tops(self, css: str) -> list[float]:
        """Return the distances of the elements' upper edges from the window's [screen pixels]."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(one => one.getBoundingClientRect().top)", css
        )

    def contrast(self, css: str) -> float:
        """Return the contrast ratio of an element's text with its background, 1 to 21 (WCAG 2.1)."""
        return self.driver.execute_script(
            """
            const numbers = color => color.match(/[0-9.]+/g).map(Number);
            const luminance = color => numbers(color).slice(0, 3).map(value => value / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
            const element = document.querySelector(arguments[0]);
            const text = getComputedStyle(element).color;
            let behind = element;
            while (numbers(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
            const both = [text, getComputedStyle(behind).backgroundColor].map(luminance).sort((a, b) => b - a);
            return (both[0] + 0.05) / (both[1] + 0.05);
            """,
            css,
        )

    def theme(self, name: str) -> None:
        """Change JupyterLab's theme."""
        self.driver.execute_async_script(
            "const done = arguments[1];"
            "window.jupyterapp.commands.execute('apputils:change-theme', {theme: arguments[0]}).then(() => done())",
            name,
        )
        time.sleep(0.5)  # the style sheet is loaded after the promise resolves

    def errors(self) -> list[str]:
        """Return the errors in the browser's console.

        Chromium's message about a blocked 'beforeunload' dialog is ignored: it appears when the next notebook is opened
        before the last one is saved.
        """
        severe = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [message for message in severe if "Blocked attempt to show a 'beforeunload'" not in message]

    def screenshot(self, path: Path) -> None:
        """Save a screenshot of the window."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.driver.save_screenshot(str(path))

    def close(self) -> None:
        """End the browser."""
        self.driver.quit()


def until(condition: Callable[[], Any], seconds: float, message: str) -> None:
    """Wait for a condition, and check it every fifth of a second."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{message} after {seconds:g} s")
        time.sleep(0.2)
