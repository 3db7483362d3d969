//! Finds the two programs that build BPF code: a Rust compiler that has `core` for
//! `bpfel-unknown-none`, and `bpf-linker`.
//!
//! The stable compiler that builds the rest of the workspace ships no `core` for BPF, and which
//! compiler does differs per machine, so both are looked for, not named. The rules:
//!
//! - A compiler is a folder with `bin/cargo`, `bin/rustc` and `core`: built already (Debian's
//!   `libstd-rust-web-dev-bpf`), which is quicker, or as source (rustup's `rust-src`, Debian's
//!   `rust-web-src`). It may be a stable one: `RUSTC_BOOTSTRAP=1` unlocks what BPF needs.
//! - `bpf-linker` reads the compiler's LLVM bitcode, so its LLVM must not be older than the
//!   compiler's ("Invalid record" otherwise). It says its own version but not its LLVM's, which is
//!   therefore read from the file.
//!
//! This file is a module of two programs, xtask and `forwarder-user/build.rs` (by `#[path]`): what
//! `cargo xtask setup` calls found is then what the build uses. It needs `std` only, so that the build
//! script needs no dependency. It finds and judges; it installs nothing and builds nothing.

use std::{
    env, fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Oldest compiler accepted: `rust-version` of the workspace.
pub(crate) const OLDEST_RUSTC: Version = Version(1, 95, 0);
/// Oldest `bpf-linker` accepted: the first that builds with LLVM 22.
pub(crate) const OLDEST_LINKER: Version = Version(0, 13, 0);
/// LLVM of the `bpf-linker` that setup builds, and the oldest accepted: rustc 1.95 has this one.
pub(crate) const LLVM: u32 = 22;
/// Environment variable that names the only compiler to consider: the start of a rustup toolchain's
/// name (`nightly`, `1.95.0`), or `system` for the one in `/usr`.
pub(crate) const CHOICE_VARIABLE: &str = "FORWARDER_BPF_TOOLCHAIN";

/// major, minor, patch
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub(crate) u32, pub(crate) u32, pub(crate) u32);

impl Version {
    /// Reads the number that `text` starts with: `1.97.0-nightly` is 1.97.0, `22.1` is 22.1.0.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let mut numbers = text[..end].split('.').map(|part| part.parse().ok());
        Some(Self(
            numbers.next()??,
            numbers.next().flatten().unwrap_or(0),
            numbers.next().flatten().unwrap_or(0),
        ))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// In what form a compiler has `core` for BPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Core {
    /// Built: nothing to do.
    Prebuilt,
    /// As source: cargo builds it with `-Z build-std=core`.
    Source,
}

/// A Rust compiler with its cargo, fit for BPF or not.
#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    /// rustup's name for it, or `system`.
    pub(crate) name: String,
    /// The folder that has `bin` and `lib/rustlib`.
    pub(crate) root: PathBuf,
    pub(crate) version: Version,
    pub(crate) is_nightly: bool,
    /// Major version of its LLVM.
    pub(crate) llvm: u32,
    /// None: it can build for the host only.
    pub(crate) core: Option<Core>,
}

impl Compiler {
    pub(crate) fn cargo(&self) -> PathBuf {
        self.root.join("bin/cargo")
    }

    pub(crate) fn rustc(&self) -> PathBuf {
        self.root.join("bin/rustc")
    }

    /// Why this compiler can't build BPF code that a linker with LLVM `linker_llvm` reads.
    ///
    /// # Errors
    /// One clause for the user, without the compiler's name.
    pub(crate) fn fits(&self, linker_llvm: u32) -> Result<(), String> {
        if self.version < OLDEST_RUSTC {
            return Err(format!("older than {OLDEST_RUSTC}"));
        }
        if self.llvm > linker_llvm {
            return Err(format!(
                "its LLVM {} is newer than bpf-linker's {linker_llvm}",
                self.llvm
            ));
        }
        if self.core.is_none() {
            return Err("has no `core` for BPF, neither built nor as source (rust-src)".into());
        }
        Ok(())
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nightly = if self.is_nightly { "-nightly" } else { "" };
        write!(
            f,
            "rustc {}{nightly}, LLVM {} ({})",
            self.version, self.llvm, self.name
        )
    }
}

/// A `bpf-linker`, fit or not.
#[derive(Clone, Debug)]
pub(crate) struct Linker {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
    /// Major version of its LLVM; None if the file doesn't tell.
    pub(crate) llvm: Option<u32>,
}

impl Linker {
    /// Newest LLVM whose bitcode it reads. One that doesn't tell was built by its user on purpose,
    /// so it is trusted with [`LLVM`].
    pub(crate) fn reads_llvm(&self) -> u32 {
        self.llvm.unwrap_or(LLVM)
    }

    /// Why this linker can't be used.
    ///
    /// # Errors
    /// One clause for the user, without the linker's name.
    pub(crate) fn fits(&self) -> Result<(), String> {
        if self.version < OLDEST_LINKER {
            return Err(format!("older than {OLDEST_LINKER}"));
        }
        if self.reads_llvm() < LLVM {
            return Err(format!("its LLVM is older than {LLVM}"));
        }
        Ok(())
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bpf-linker {}", self.version)?;
        if let Some(llvm) = self.llvm {
            write!(f, ", LLVM {llvm}")?;
        }
        write!(f, " ({})", self.path.display())
    }
}

/// Everything found on this machine, fit or not, best first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Survey {
    pub(crate) compilers: Vec<Compiler>,
    pub(crate) linkers: Vec<Linker>,
}

impl Survey {
    /// Looks around: for compilers in rustup's home and `/usr`, for linkers in `tools` (the folder that
    /// `cargo xtask setup` installs into), in PATH and in cargo's home.
    pub(crate) fn take(tools: &Path) -> Self {
        let mut compilers: Vec<Compiler> = compiler_roots()
            .into_iter()
            .filter_map(|(name, root)| inspect_compiler(name, root))
            .collect();
        if let Some(choice) = env::var_os(CHOICE_VARIABLE) {
            compilers.retain(|c| c.name.starts_with(&*choice.to_string_lossy()));
        }
        let linkers = linker_paths(tools)
            .into_iter()
            .filter_map(inspect_linker)
            .collect();
        Self::new(compilers, linkers)
    }

    /// Orders what was found: linkers stay in the order of the search; compilers with `core` built come
    /// before those with its source, nightlies before stable ones, newer before older.
    pub(crate) fn new(mut compilers: Vec<Compiler>, linkers: Vec<Linker>) -> Self {
        compilers.sort_by_key(|c| {
            let core = c.core.map_or(2, |core| core as u8);
            (core, !c.is_nightly, std::cmp::Reverse(c.version))
        });
        Self { compilers, linkers }
    }

    /// The linker to use: the first that is fit.
    pub(crate) fn linker(&self) -> Option<&Linker> {
        self.linkers.iter().find(|l| l.fits().is_ok())
    }

    /// The compiler to use with [`Self::linker`], or with the linker that setup would build.
    pub(crate) fn compiler(&self) -> Option<&Compiler> {
        let llvm = self.linker_llvm();
        self.compilers.iter().find(|c| c.fits(llvm).is_ok())
    }

    /// LLVM of the linker that will be used.
    pub(crate) fn linker_llvm(&self) -> u32 {
        self.linker().map_or(LLVM, Linker::reads_llvm)
    }

    /// The pair to build with.
    ///
    /// # Errors
    /// The whole message for the user, several lines: what was looked at, why it won't do, what to do.
    pub(crate) fn choose(&self) -> Result<(&Compiler, &Linker), String> {
        if let (Some(compiler), Some(linker)) = (self.compiler(), self.linker()) {
            return Ok((compiler, linker));
        }
        let mut message =
            String::from("this machine can't build the BPF programs yet (target bpfel-unknown-none)\n");
        match self.compiler() {
            Some(compiler) => message.push_str(&format!("  found    {compiler}\n")),
            None => {
                message.push_str("  missing  a Rust compiler with `core` for BPF\n");
                for compiler in &self.compilers {
                    if let Err(why) = compiler.fits(self.linker_llvm()) {
                        message.push_str(&format!("           {compiler}: {why}\n"));
                    }
                }
                if let Some(choice) = env::var_os(CHOICE_VARIABLE) {
                    message.push_str(&format!(
                        "           (only {choice:?} is considered: {CHOICE_VARIABLE})\n"
                    ));
                }
            }
        }
        match self.linker() {
            Some(linker) => message.push_str(&format!("  found    {linker}\n")),
            None => {
                message.push_str(&format!("  missing  bpf-linker {OLDEST_LINKER} or newer\n"));
                for linker in &self.linkers {
                    if let Err(why) = linker.fits() {
                        message.push_str(&format!("           {linker}: {why}\n"));
                    }
                }
            }
        }
        message.push_str("  hint: `cargo xtask setup` finds or installs what is missing");
        Err(message)
    }
}

/// First match of `name` in PATH, or in the folders of administrators' programs, which an ordinary
/// user's PATH lacks.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

fn home(variable: &str, default: &str) -> Option<PathBuf> {
    env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(default)))
}

/// (name, root) of every place a compiler may be, without doubles: rustup links some of its names to
/// the same folder.
fn compiler_roots() -> Vec<(String, PathBuf)> {
    let toolchains = home("RUSTUP_HOME", ".rustup").map(|home| home.join("toolchains"));
    let mut roots: Vec<(String, PathBuf)> = toolchains
        .and_then(|folder| fs::read_dir(folder).ok())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let root = entry.path().canonicalize().ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), root))
        })
        .collect();
    // A folder's own name before the names linked to it.
    roots.sort_by_key(|(name, root)| (root.clone(), !root.ends_with(name), name.clone()));
    if env::var_os(CHOICE_VARIABLE).is_none() {
        roots.dedup_by(|a, b| a.1 == b.1);
    }
    roots.push(("system".into(), PathBuf::from("/usr")));
    roots
}

fn linker_paths(tools: &Path) -> Vec<PathBuf> {
    let mut paths = vec![tools.join("bin/bpf-linker")];
    paths.extend(find_program("bpf-linker"));
    paths.extend(home("CARGO_HOME", ".cargo").map(|home| home.join("bin/bpf-linker")));
    paths.dedup();
    paths
}

/// What `program arguments` prints, if it can be run and succeeds.
fn output_of(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then_some(text)
}

fn inspect_compiler(name: String, root: PathBuf) -> Option<Compiler> {
    if !root.join("bin/cargo").is_file() {
        return None;
    }
    let report = output_of(&root.join("bin/rustc"), &["-vV"])?;
    let (version, is_nightly, llvm) = parse_compiler_report(&report)?;
    let core = find_core(&root);
    Some(Compiler {
        name,
        root,
        version,
        is_nightly,
        llvm,
        core,
    })
}

/// (release, is it a nightly, LLVM's major version) out of `rustc -vV`.
fn parse_compiler_report(report: &str) -> Option<(Version, bool, u32)> {
    let field = |key: &str| report.lines().find_map(|line| line.strip_prefix(key));
    let release = field("release: ")?;
    let Version(llvm, ..) = Version::parse(field("LLVM version: ")?)?;
    Some((Version::parse(release)?, release.contains("nightly"), llvm))
}

fn find_core(root: &Path) -> Option<Core> {
    let rustlib = root.join("lib/rustlib");
    let prebuilt = fs::read_dir(rustlib.join("bpfel-unknown-none/lib"))
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"));
    if prebuilt {
        return Some(Core::Prebuilt);
    }
    let source = rustlib.join("src/rust/library/core/Cargo.toml");
    source.is_file().then_some(Core::Source)
}

fn inspect_linker(path: PathBuf) -> Option<Linker> {
    let report = output_of(&path, &["--version"])?;
    let version = Version::parse(report.trim().strip_prefix("bpf-linker ")?)?;
    let llvm = fs::read(&path).ok().as_deref().and_then(find_llvm);
    Some(Linker { path, version, llvm })
}

/// LLVM's major version out of a program's bytes. A program that loads LLVM at run time names the
/// library (`libLLVM.so.22.1`, `libLLVM-22.so`), one that contains it has the name that LLVM writes into
/// bitcode files (`LLVM22.1.4`).
fn find_llvm(program: &[u8]) -> Option<u32> {
    const NAME: &[u8] = b"LLVM";
    let mut rest = program;
    loop {
        let start = rest.iter().position(|byte| *byte == NAME[0])?;
        rest = &rest[start..];
        let Some(mut tail) = rest.strip_prefix(NAME) else {
            rest = &rest[1..];
            continue;
        };
        rest = tail;
        for separator in [b".so.".as_slice(), b"-"] {
            tail = tail.strip_prefix(separator).unwrap_or(tail);
        }
        let digits = tail.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let is_version = (2..=3).contains(&digits) && tail.get(digits) == Some(&b'.');
        if is_version {
            let text = std::str::from_utf8(&tail[..digits]).ok()?;
            return text.parse().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiler(name: &str, version: Version, llvm: u32, core: Option<Core>) -> Compiler {
        Compiler {
            name: name.into(),
            root: PathBuf::from("/toolchains").join(name),
            version,
            is_nightly: name.starts_with("nightly"),
            llvm,
            core,
        }
    }

    fn linker(version: Version, llvm: Option<u32>) -> Linker {
        Linker {
            path: "/tools/bin/bpf-linker".into(),
            version,
            llvm,
        }
    }

    const RUSTC: Version = Version(1, 96, 0);
    const LINKER: Version = Version(0, 13, 0);

    #[test]
    fn a_version_is_read_up_to_its_suffix() {
        assert_eq!(Version::parse("1.97.0-nightly"), Some(Version(1, 97, 0)));
        assert_eq!(Version::parse("22.1"), Some(Version(22, 1, 0)));
        assert_eq!(Version::parse("nightly"), None);
    }

    #[test]
    fn a_compiler_report_gives_release_channel_and_llvm() {
        let nightly = "rustc 1.97.0-nightly (e50aa6fba 2026-05-19)\nbinary: rustc\n\
                       host: x86_64-unknown-linux-gnu\nrelease: 1.97.0-nightly\nLLVM version: 22.1.4\n";
        assert_eq!(
            parse_compiler_report(nightly),
            Some((Version(1, 97, 0), true, 22))
        );
        let debian = "rustc 1.96.0 (built from a source tarball)\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_compiler_report(debian), Some((RUSTC, false, 22)));
        assert_eq!(parse_compiler_report("release: 1.96.0\n"), None);
    }

    #[test]
    fn a_linker_tells_its_llvm_by_library_name_or_by_producer() {
        assert_eq!(find_llvm(b"\0libLLVM.so.22.1\0"), Some(22));
        assert_eq!(find_llvm(b"\0libLLVM-21.so\0LLVM IR"), Some(21));
        assert_eq!(find_llvm(b"LLVM_SYS_221\0LLVM\0LLLVM23.1.0\0"), Some(23));
        assert_eq!(find_llvm(b"LLVM version\0LLVM-C"), None);
    }

    #[test]
    fn built_core_is_preferred_then_nightlies_then_newer_ones() {
        let survey = Survey::new(
            vec![
                compiler("stable", Version(1, 97, 0), 22, Some(Core::Source)),
                compiler("1.95.0", Version(1, 95, 0), 22, Some(Core::Source)),
                compiler("nightly", RUSTC, 22, Some(Core::Source)),
                compiler("none", Version(1, 98, 0), 22, None),
                compiler("system", RUSTC, 22, Some(Core::Prebuilt)),
            ],
            vec![linker(LINKER, Some(22))],
        );
        let names: Vec<&str> = survey.compilers.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["system", "nightly", "stable", "1.95.0", "none"]);
        assert_eq!(survey.choose().unwrap().0.name, "system");
    }

    #[test]
    fn a_compiler_whose_llvm_is_newer_than_the_linkers_is_passed_over() {
        let survey = Survey::new(
            vec![
                compiler("nightly", Version(1, 99, 0), 23, Some(Core::Source)),
                compiler("stable", Version(1, 95, 0), 22, Some(Core::Source)),
            ],
            vec![linker(LINKER, Some(22))],
        );
        assert_eq!(survey.choose().unwrap().0.name, "stable");
    }

    #[test]
    fn without_a_linker_compilers_are_judged_by_the_linker_that_setup_builds() {
        let survey = Survey::new(
            vec![
                compiler("nightly", Version(1, 99, 0), 23, Some(Core::Source)),
                compiler("system", RUSTC, 22, Some(Core::Prebuilt)),
            ],
            vec![linker(Version(0, 12, 0), Some(22)), linker(LINKER, Some(21))],
        );
        assert_eq!(survey.linker().map(|l| &l.path), None);
        assert_eq!(survey.compiler().unwrap().name, "system");
        let message = survey.choose().unwrap_err();
        assert!(message.contains("missing  bpf-linker 0.13.0"), "{message}");
        assert!(message.contains("older than 0.13.0"), "{message}");
        assert!(message.contains("its LLVM is older than 22"), "{message}");
    }

    #[test]
    fn a_linker_that_does_not_tell_its_llvm_is_trusted_with_the_usual_one() {
        let survey = Survey::new(
            vec![compiler("system", RUSTC, 22, Some(Core::Prebuilt))],
            vec![linker(LINKER, None)],
        );
        assert!(survey.choose().is_ok());
    }

    #[test]
    fn the_message_says_of_each_compiler_why_it_will_not_do() {
        let survey = Survey::new(
            vec![
                compiler("stable", Version(1, 95, 0), 22, None),
                compiler("old", Version(1, 90, 0), 21, Some(Core::Source)),
            ],
            vec![linker(LINKER, Some(22))],
        );
        let message = survey.choose().unwrap_err();
        assert!(message.contains("(stable): has no `core`"), "{message}");
        assert!(message.contains("(old): older than 1.95.0"), "{message}");
        assert!(message.contains("found    bpf-linker"), "{message}");
        assert!(message.contains("cargo xtask setup"), "{message}");
    }
}
