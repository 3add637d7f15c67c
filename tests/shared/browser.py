"""A headless Chromium, driven by selenium, in which nothing leaves the machine."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NEEDED = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no chromium and chromedriver: apt-get install chromium-driver",
)
SWITCHES = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--window-size=1200,800",
]
PHONE = {"width": 375, "height": 667, "deviceScaleFactor": 2, "mobile": True}


class Browser:
    """One browser, with a profile of its own."""

    def __init__(self, profile):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for switch in [*SWITCHES, f"--user-data-dir={profile}"]:
            options.add_argument(switch)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def wait(self, condition, seconds=20):
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def asked(self) -> list[str]:
        """What the page has asked for."""
        script = "return performance.getEntriesByType('resource').map(entry => entry.name)"
        return self.driver.execute_script(script)

    def faults(self) -> list[str]:
        """What the page's console holds of errors, refusals of its policy among them."""
        log = self.driver.get_log("browser")
        return [line["message"] for line in log if line["level"] == "SEVERE"]
