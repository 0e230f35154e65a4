//! Ctrl-C, and being asked to end: nothing half-written is left behind.

/// Removes what is unfinished when the program is interrupted, and then ends it as the signal would have.
#[cfg(unix)]
pub(super) fn watch() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    use signal_hook::iterator::Signals;
    use signal_hook::low_level::emulate_default_handler;

    let ignored = ignored();
    let heard = [SIGINT, SIGTERM, SIGHUP];
    let heard = heard.into_iter().filter(|s| ignored & (1 << (s - 1)) == 0);
    // Without it, all works but the tidying up.
    let Ok(mut signals) = Signals::new(heard) else {
        return;
    };
    std::thread::spawn(move || {
        for signal in signals.forever() {
            let _held = crate::onnx::unfinished::discard();
            let _ = emulate_default_handler(signal);
        }
    });
}

/// Nothing is heard here.
#[cfg(not(unix))]
pub(super) fn watch() {}

/// Signals that whoever started the program wants ignored (`nohup`, jobs in the background of a script), as a mask.
#[cfg(unix)]
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    line.map_or(0, |mask| u64::from_str_radix(mask.trim(), 16).unwrap_or(0))
}
