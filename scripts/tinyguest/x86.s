# A guest without an operating system: it writes "tick N" to the serial port
# about every 110 ms, N in 8 hexadecimal digits, and changes memory meanwhile.
# It boots in a moment, and its memory holds nothing but what the test put there
# with -device loader, so that a recorded stream of it is small.
#
# Three 32-bit words at 0x1ff000, put there with -device loader, say what to change:
#
#	0x1ff000  address of the first page
#	0x1ff004  number of pages in the range, 0 for none
#	0x1ff008  pages to change in each tick
#
# Every 37th page is taken, round and round; of each, one 32-bit word is increased,
# at an offset that moves on by 68 bytes a page. All pages have their turn if their
# number is no multiple of 37.
#
# QEMU starts it in 32-bit protected mode, through the PVH note on newer machine
# types and microvm, and through the multiboot header on older ones.

	.set	PARAMS, 0x1ff000
	.set	COM1, 0x3f8
	.set	PIT, 0x40

	.section .note.pvh, "a", @note
	.long	4, 4, 18		# name size, desc size, XEN_ELFNOTE_PHYS32_ENTRY
	.asciz	"Xen"
	.long	start

	.section .text.start, "ax"
	.balign	4
	.long	0x1badb002, 0, -0x1badb002	# multiboot: magic, flags, checksum

	.code32
	.globl	start
start:
	cli
	mov	$stack_end, %esp
	mov	$0x34, %al		# PIT channel 0: mode 2, count 65536 (54.9 ms)
	out	%al, $PIT+3
	xor	%al, %al
	out	%al, $PIT
	out	%al, $PIT
	xor	%ebx, %ebx		# tick
	xor	%esi, %esi		# page within the range
	mov	$68, %edi		# offset of the word

tick:
	inc	%ebx
	mov	PARAMS+4, %edx
	test	%edx, %edx
	jz	wait
	mov	PARAMS+8, %ecx
	jecxz	wait
change:
	mov	%esi, %eax
	shl	$12, %eax
	add	PARAMS, %eax
	incl	(%eax, %edi)
	add	$68, %edi
	and	$0xffc, %edi
	add	$37, %esi
1:	cmp	%edx, %esi
	jb	2f
	sub	%edx, %esi
	jmp	1b
2:	loop	change

wait:	call	wrap
	call	wrap
	mov	$text, %ebp
	call	print
	mov	$8, %ecx
	mov	%ebx, %edx
digit:	rol	$4, %edx
	mov	%edx, %eax
	and	$15, %eax
	mov	hex(%eax), %al
	call	putc
	loop	digit
	mov	$newline, %ebp
	call	print
	jmp	tick

# wrap returns when the counter has run through once.
wrap:	call	count
	mov	%eax, %ebp
1:	call	count
	cmp	%eax, %ebp
	mov	%eax, %ebp
	jae	1b
	ret

count:	xor	%eax, %eax		# latch channel 0
	out	%al, $PIT+3
	in	$PIT, %al
	mov	%al, %ah
	in	$PIT, %al
	xchg	%al, %ah
	ret

print:	mov	(%ebp), %al
	test	%al, %al
	jz	1f
	call	putc
	inc	%ebp
	jmp	print
1:	ret

putc:	push	%edx
	push	%eax
	mov	$COM1+5, %edx
1:	in	%dx, %al
	test	$0x20, %al		# transmitter empty
	jz	1b
	pop	%eax
	mov	$COM1, %edx
	out	%al, %dx
	pop	%edx
	ret

	.section .rodata
text:	.asciz	"tick "
newline: .asciz	"\r\n"
hex:	.ascii	"0123456789abcdef"

	.section .bss
	.balign	16
	.skip	1024
stack_end:
