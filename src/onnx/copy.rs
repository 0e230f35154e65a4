//! Bytes from file to file, without a detour through memory.
//!
//! On Linux the kernel copies (`copy_file_range`), or shares the blocks where the
//! file system can; holes stay holes. Elsewhere, between file systems that the
//! kernel does not copy between, and where bytes come to lie elsewhere in their
//! page (the kernel then moves every page in two pieces, which is slower), they go
//! through one small buffer. Pages of a mapping are never touched: they would count
//! as this process's memory, all gigabytes of them.

#[cfg(unix)]
use std::fs::File;
use std::io;
use std::path::Path;

/// Size of the buffer where the kernel does not copy: it stays in a core's cache.
#[cfg(unix)]
const BUFFER: usize = 1 << 19;

/// Pages of the file cache.
#[cfg(target_os = "linux")]
const PAGE: u64 = 4096;

/// Copies a file with its permissions to a path that does not exist yet.
///
/// # Errors
/// Those of reading and writing.
pub(super) fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        let source = File::open(from)?;
        let metadata = source.metadata()?;
        let target = File::create_new(to)?;
        if !share_blocks(&source, &target) {
            let mut buffer = Vec::new();
            for (start, end) in stretches(&source, metadata.len()) {
                rustix::fs::seek(&target, rustix::fs::SeekFrom::Start(start))?;
                copy_range(&source, start, end - start, &target, &mut buffer)?;
            }
            // A hole at the end is no stretch.
            target.set_len(metadata.len())?;
        }
        target.set_permissions(metadata.permissions())
    }
    #[cfg(not(target_os = "linux"))]
    std::fs::copy(from, to).map(|_| ())
}

/// Lets both files have the same blocks until one of them changes, where the
/// file system can.
#[cfg(all(
    target_os = "linux",
    not(any(target_arch = "sparc", target_arch = "sparc64"))
))]
fn share_blocks(from: &File, to: &File) -> bool {
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

#[cfg(all(
    target_os = "linux",
    any(target_arch = "sparc", target_arch = "sparc64")
))]
fn share_blocks(_: &File, _: &File) -> bool {
    false
}

/// Where a file of so many bytes has data: (start, end) of each stretch between
/// its holes. All of it where the file system does not say.
#[cfg(target_os = "linux")]
fn stretches(file: &File, length: u64) -> Vec<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};
    let mut found = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => return vec![(0, length)],
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(length);
        let end = end.min(length);
        if end <= start {
            break;
        }
        found.push((start, end));
        at = end;
    }
    found
}

/// Appends `length` bytes of `from`, from `offset` on, to where `to` stands.
/// The place at which `from` stands is neither used nor changed. `buffer` is made
/// when it is needed, and serves for further calls.
///
/// # Errors
/// Those of reading and writing; a file that ends before.
#[cfg(unix)]
pub(super) fn copy_range(
    from: &File,
    offset: u64,
    length: u64,
    to: &File,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    let done = by_kernel(from, offset, length, to)?;
    through_buffer(from, offset + done, length - done, to, buffer)
}

/// As many bytes as the kernel copies itself.
#[cfg(target_os = "linux")]
fn by_kernel(from: &File, offset: u64, length: u64, to: &File) -> io::Result<u64> {
    use rustix::io::Errno;
    let place = rustix::fs::tell(to)?;
    if place % PAGE != offset % PAGE {
        return Ok(0);
    }
    let mut at = offset;
    let end = offset + length;
    while at < end {
        let step = usize::try_from(end - at).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(from, Some(&mut at), to, None, step) {
            // Some file systems say so where they cannot: the buffer finds out.
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            // Not between these two: other file systems, special files, an old kernel.
            Err(
                Errno::XDEV
                | Errno::NOSYS
                | Errno::OPNOTSUPP
                | Errno::INVAL
                | Errno::PERM
                | Errno::BADF
                | Errno::IO,
            ) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(at - offset)
}

#[cfg(all(unix, not(target_os = "linux")))]
fn by_kernel(_: &File, _: u64, _: u64, _: &File) -> io::Result<u64> {
    Ok(0)
}

#[cfg(unix)]
fn through_buffer(
    from: &File,
    offset: u64,
    length: u64,
    mut to: &File,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    if length > 0 {
        buffer.resize(BUFFER, 0);
    }
    let mut done = 0;
    while done < length {
        let left = usize::try_from(length - done).unwrap_or(BUFFER).min(BUFFER);
        let piece = &mut buffer[..left];
        from.read_exact_at(piece, offset + done)?;
        to.write_all(piece)?;
        done += left as u64;
    }
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use std::fs;
    use std::io::{Seek, SeekFrom, Write};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn bytes(count: usize) -> Vec<u8> {
        (0..count).map(|i| (i * 31 % 251) as u8).collect()
    }

    #[test]
    fn ranges_are_appended_whichever_way_they_go() {
        let dir = tempfile::tempdir().unwrap();
        let all = bytes(3 * BUFFER + 17);
        fs::write(dir.path().join("from"), &all).unwrap();
        let from = File::open(dir.path().join("from")).unwrap();
        let mut buffer = Vec::new();
        // In step with the pages or not, and past the end.
        for offset in [6, 5] {
            let path = dir.path().join("to");
            let mut to = File::create(&path).unwrap();
            to.write_all(b"before").unwrap();
            let length = 2 * BUFFER + 3;
            copy_range(&from, offset, length as u64, &to, &mut buffer).unwrap();
            to.write_all(b"after").unwrap();
            let offset = offset as usize;
            let expected = [b"before", &all[offset..offset + length], b"after"].concat();
            assert!(fs::read(&path).unwrap() == expected, "from {offset}");
            for offset in [all.len() as u64 - 1, all.len() as u64 + 10] {
                let beyond = copy_range(&from, offset, 2, &to, &mut buffer).unwrap_err();
                assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
            }
        }
        assert_eq!(buffer.len(), BUFFER, "it was not needed");
    }

    #[test]
    fn holes_stay_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let mut file = File::create(&from).unwrap();
        file.write_all(b"begin").unwrap();
        file.seek(SeekFrom::Start(32 << 20)).unwrap();
        file.write_all(&bytes(100_000)).unwrap();
        file.set_len(64 << 20).unwrap();
        let mut permissions = file.metadata().unwrap().permissions();
        permissions.set_mode(0o640);
        file.set_permissions(permissions).unwrap();
        drop(file);
        copy_file(&from, &to).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        let (old, new) = (fs::metadata(&from).unwrap(), fs::metadata(&to).unwrap());
        assert_eq!(new.mode(), old.mode());
        // Where the file system keeps holes at all.
        if cfg!(target_os = "linux") && old.blocks() * 512 < 1 << 20 {
            assert!(new.blocks() * 512 < 1 << 20, "{} blocks", new.blocks());
        }
        assert!(copy_file(&from, &to).is_err(), "it replaced a file");
        let empty = dir.path().join("empty");
        fs::write(&empty, b"").unwrap();
        copy_file(&empty, &dir.path().join("empty-too")).unwrap();
        assert_eq!(fs::read(dir.path().join("empty-too")).unwrap(), b"");
    }
}
