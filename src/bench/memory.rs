//! Peak memory of this process.

/// Largest resident size of this process so far, in bytes: weights as they are mapped or packed, activations, caches.
///
/// # Errors
/// Why it is not known here.
pub(super) fn peak() -> Result<u64, String> {
    let path = "/proc/self/status";
    let text = std::fs::read_to_string(path)
        .map_err(|e| format!("the system does not say ({path}: {e})"))?;
    of_status(&text).ok_or_else(|| format!("the system does not say ({path} has no VmHWM)"))
}

/// The line `VmHWM:   1234 kB` of Linux's status file.
fn of_status(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_file_is_read() {
        let text = "Name:\tduet\nVmPeak:\t  99 kB\nVmHWM:\t    1234 kB\nVmRSS:\t 12 kB\n";
        assert_eq!(of_status(text), Some(1234 * 1024));
        assert_eq!(of_status("Name:\tduet\n"), None);
        assert_eq!(of_status("VmHWM: lots kB\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_process_has_a_peak() {
        let before = peak().unwrap();
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak().unwrap() >= before.max(64 << 20));
        drop(block);
    }
}
