// The guest of x86.s for QEMU's aarch64 machine "virt": "tick N" every 100 ms on
// the PL011, and the same changes to memory. The three 32-bit words that say what
// to change are at 0x401ff000; the pages' address is given from the start of RAM,
// 0x40000000.

	.set	RAM, 0x40000000
	.set	PARAMS, 0x401ff000
	.set	UART, 0x09000000

	.section .text.start, "ax"
	.globl	start
start:
	ldr	x0, =stack_end
	mov	sp, x0
	ldr	x19, =PARAMS
	mov	w20, #0			// tick
	mov	w21, #0			// page within the range
	mov	w22, #68		// offset of the word
	mrs	x23, cntfrq_el0
	mov	x0, #10
	udiv	x23, x23, x0		// counts in 100 ms
	mrs	x24, cntvct_el0		// when the tick ends

tick:
	add	w20, w20, #1
	add	x24, x24, x23
	ldr	w1, [x19, #4]
	cbz	w1, wait
	ldr	w2, [x19, #8]
	cbz	w2, wait
	ldr	w3, [x19]
	ldr	x0, =RAM
	add	x3, x3, x0
change:
	add	x4, x3, x21, lsl #12
	ldr	w5, [x4, x22]
	add	w5, w5, #1
	str	w5, [x4, x22]
	add	w22, w22, #68
	and	w22, w22, #0xffc
	add	w21, w21, #37
1:	cmp	w21, w1
	b.lo	2f
	sub	w21, w21, w1
	b	1b
2:
	subs	w2, w2, #1
	b.ne	change

wait:	isb
	mrs	x0, cntvct_el0
	cmp	x0, x24
	b.lo	wait
	adr	x6, text
	bl	print
	mov	w7, #8
	mov	w8, w20
	adr	x9, hex
digit:	ror	w8, w8, #28
	and	w0, w8, #15
	ldrb	w0, [x9, x0]
	bl	putc
	subs	w7, w7, #1
	b.ne	digit
	adr	x6, newline
	bl	print
	b	tick

print:	mov	x10, x30
1:	ldrb	w0, [x6], #1
	cbz	w0, 2f
	bl	putc
	b	1b
2:	ret	x10

putc:	ldr	x11, =UART
1:	ldr	w12, [x11, #0x18]	// flags
	tbnz	w12, #5, 1b		// transmitter full
	str	w0, [x11]
	ret

text:	.asciz	"tick "
newline: .asciz	"\r\n"
hex:	.ascii	"0123456789abcdef"
	.balign	8
	.ltorg

	.section .bss
	.balign	16
	.skip	1024
stack_end:
