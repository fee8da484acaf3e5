//! What depends on the processor: where things lie in the guest's address space, how its kernel is started,
//! and the state its vCPUs begin with. Only x86-64 so far; another architecture gets a directory beside it.

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
